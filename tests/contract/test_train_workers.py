"""RemoteEngine when its workers fail: clear errors, nothing left running, nothing hangs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lorelei.train.archon.kind import ArchonSpec
from lorelei.train.contract import EngineFailed
from lorelei.train.remote.engine import RemoteEngine
from lorelei.types import AdapterSpec, Batch, LossSpec
from tests.contract.train_engines import GRPO, adapters, assert_equal, gradients
from tests.episodes import random_group, weighted_batch
from tests.tiny_models import make_tiny

pytestmark = pytest.mark.slow
SPEC = AdapterSpec(rank=2, alpha=4, target_modules=("q_proj",))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> ArchonSpec:
    folder = make_tiny("llama", tmp_path_factory.mktemp("llama"))
    return ArchonSpec(model=str(folder), dtype="float32", max_tokens_per_mb=64, recompute=False)


@pytest.fixture
def engine(start: ArchonSpec) -> Iterator[RemoteEngine]:
    made = RemoteEngine(start, workers=2, timeout=60)
    yield made
    made.close()


def gone(pid: int) -> bool:
    """Whether no process has this pid: ended, and collected by its parent."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def one_batch() -> Batch:
    return weighted_batch("a", [random_group(np.random.default_rng(0), 5, [3, 4])])


def test_a_killed_worker_is_named_and_the_others_are_stopped(engine: RemoteEngine) -> None:
    engine.add_adapter("a", SPEC)
    pids = engine.pids
    os.kill(pids[1], signal.SIGKILL)
    began = time.monotonic()
    words = rf"train worker 1 \(pid {pids[1]}\) of 2: was killed by SIGKILL during forward_backward"
    with pytest.raises(EngineFailed, match=words):
        engine.forward_backward(one_batch(), {"a": GRPO})
    assert time.monotonic() - began < 10
    assert all(map(gone, pids))
    with pytest.raises(EngineFailed, match="was killed by SIGKILL"):
        engine.adapter_state("a")
    engine.close()


def test_a_worker_that_hangs_is_an_error_after_the_timeout(start: ArchonSpec) -> None:
    engine = RemoteEngine(start, workers=2, timeout=15)
    pids = engine.pids
    engine._timeout = 2.0  # starting takes longer than a call on a tiny model
    os.kill(pids[0], signal.SIGSTOP)
    with pytest.raises(EngineFailed, match=rf"train worker 0 \(pid {pids[0]}\) .*in 2 s"):
        engine.add_adapter("a", SPEC)
    assert all(map(gone, pids))


def test_an_unforeseen_error_of_a_loss_comes_with_its_text_and_harms_nothing(
    engine: RemoteEngine,
) -> None:
    breaks = LossSpec(path="tests.contract.losses:breaks", params={})
    with adapters(engine, a=SPEC):
        expected = gradients(engine, one_batch(), {"a": GRPO})["a"]
        with pytest.raises(EngineFailed, match=r"(?s)forward_backward.*AttributeError: 'str'"):
            engine.forward_backward(one_batch(), {"a": breaks})
        assert_equal(gradients(engine, one_batch(), {"a": GRPO})["a"], expected)


def test_closing_ends_the_workers_and_may_be_done_twice(engine: RemoteEngine) -> None:
    pids = engine.pids
    assert not any(map(gone, pids))
    engine.close()
    engine.close()
    assert all(map(gone, pids))
    with pytest.raises(EngineFailed, match="closed"):
        engine.snapshot("a")


def test_an_engine_that_cannot_be_built_says_why(start: ArchonSpec, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has neither config"):
        RemoteEngine(replace(start, model=str(tmp_path)), workers=2, timeout=60)


def test_an_interpreter_that_is_no_worker_is_an_error(start: ArchonSpec, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 3\n")
    python.chmod(0o755)
    with pytest.raises(EngineFailed, match=r"train worker 0 .* ended with exit status 3"):
        RemoteEngine(start, workers=1, python=str(python), timeout=60)
