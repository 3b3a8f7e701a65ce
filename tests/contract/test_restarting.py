"""An engine whose workers are lost at any moment ends with the adapters of one left alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from lorelei.lora.state import AdapterSnapshot
from lorelei.train.archon.kind import ArchonSpec
from lorelei.train.batch import concatenate
from lorelei.train.contract import EngineFailed, TrainEngine, WorkersLost
from lorelei.train.remote.engine import RemoteEngine
from lorelei.train.remote.restarting import LONGEST, Restarting
from lorelei.types import AdamHyper, AdapterSpec, Batch, LossSpec
from tests.contract.train_engines import GRPO, assert_equal, randomise
from tests.episodes import random_group, weighted_batch
from tests.tiny_models import make_tiny

pytestmark = pytest.mark.slow
SPEC = AdapterSpec(rank=2, alpha=4, target_modules=("q_proj", "up_proj"))
HYPER = AdamHyper(lr=1e-2)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ArchonSpec:
    folder = make_tiny("llama", tmp_path_factory.mktemp("llama"))
    return ArchonSpec(model=str(folder), dtype="float32", max_tokens_per_mb=64, recompute=False)


@pytest.fixture(scope="module")
def undisturbed(spec: ArchonSpec) -> Iterator[TrainEngine]:
    engine = RemoteEngine(spec, workers=2, timeout=60)
    yield engine
    engine.close()


@pytest.fixture
def engine(spec: ArchonSpec, request: pytest.FixtureRequest) -> Iterator[Restarting]:
    """Of one worker where a test asks for no more: it starts in half the time."""
    workers = getattr(request, "param", 1)
    made = Restarting(lambda: RemoteEngine(spec, workers=workers, timeout=60), restarts=2)
    yield made
    made.close()


def batch(seed: int, *names: str) -> Batch:
    rng = np.random.default_rng(seed)
    return concatenate([weighted_batch(name, [random_group(rng, 5, [3, 4])]) for name in names])


def kill(engine: Restarting, rank: int) -> None:
    assert isinstance(engine.engine, RemoteEngine)
    os.kill(engine.engine.pids[rank], signal.SIGKILL)


def train(
    engine: TrainEngine, disturb: Mapping[str, Callable[[], None]]
) -> dict[str, AdapterSnapshot]:
    """Steps of two adapters, together and apart, with snapshots now and then."""

    def at(moment: str) -> None:
        disturb.get(moment, lambda: None)()

    for name in ("a", "b", "gone"):
        engine.add_adapter(name, SPEC, seed=3)
        randomise(engine, name, seed=len(name))
    engine.hold("earlier", engine.adapter_state("b"))
    for step in range(2):
        engine.forward_backward(
            batch(step, "a", "b", "gone"), dict.fromkeys(("a", "b", "gone"), GRPO)
        )
        at(f"gradients {step}")
        engine.forward_backward(batch(step + 50, "a"), {"a": GRPO})  # adds to those of a
        engine.optim_step({"a": HYPER, "b": HYPER, "gone": HYPER})
        at(f"stepped {step}")
        if step == 0:
            for name in ("a", "b", "gone"):
                engine.snapshot(name)
            at("saved")
    with pytest.raises(ValueError, match="b"):  # leaves its mark: none
        engine.optim_step({"b": HYPER})
    engine.drop_adapter("gone")
    engine.add_adapter("new", SPEC, seed=9)
    at("changed")
    engine.forward_backward(batch(7, "new", "b"), {"new": GRPO, "b": GRPO})
    engine.optim_step({"new": HYPER, "b": HYPER})
    at("the end")
    return {name: engine.snapshot(name) for name in ("a", "b", "new")}


@pytest.fixture(scope="module")
def expected(undisturbed: TrainEngine) -> dict[str, AdapterSnapshot]:
    return train(undisturbed, {})


@pytest.mark.parametrize("engine", [2], indirect=True)
@pytest.mark.parametrize(
    "moment", [("gradients 0", "saved", "the end"), ("gradients 1", "changed")]
)
def test_lost_workers_are_started_again_and_the_step_is_redone(
    engine: Restarting, expected: dict[str, AdapterSnapshot], moment: tuple[str, ...]
) -> None:
    heard: list[str] = []
    engine.tell = heard.append
    found = train(engine, {m: lambda: kill(engine, rank=len(heard) % 2) for m in moment})
    assert len(heard) == len(moment) and "was killed by SIGKILL" in heard[0]
    for name, snapshot in expected.items():
        assert found[name].step == snapshot.step
        assert_equal(found[name].state.tensors, snapshot.state.tensors)
        assert_equal(found[name].exp_avg, snapshot.exp_avg)
        assert_equal(found[name].exp_avg_sq, snapshot.exp_avg_sq)


def test_a_held_policy_outlives_the_workers(engine: Restarting) -> None:
    engine.add_adapter("a", SPEC, seed=1)
    other = randomise(engine, "a", seed=5)
    engine.hold("earlier", other)
    before = engine.logprobs(batch(1, "a"), "earlier").logprobs
    kill(engine, 0)
    np.testing.assert_array_equal(engine.logprobs(batch(1, "a"), "earlier").logprobs, before)


def test_workers_that_are_lost_again_and_again_end_the_run(engine: Restarting) -> None:
    dies = LossSpec(path="tests.contract.losses:dies", params={})
    engine.add_adapter("a", SPEC, seed=1)
    with pytest.raises(EngineFailed, match="given up after 2 restarts without a finished step"):
        engine.forward_backward(batch(1, "a"), {"a": dies})


def test_no_restart_is_made_of_a_call_that_is_wrong(engine: Restarting) -> None:
    heard: list[str] = []
    engine.tell = heard.append
    engine.add_adapter("a", SPEC, seed=1)
    breaks = LossSpec(path="tests.contract.losses:breaks", params={})
    with pytest.raises(EngineFailed, match="AttributeError: 'str'") as caught:
        engine.forward_backward(batch(1, "a"), {"a": breaks})
    assert not isinstance(caught.value, WorkersLost) and heard == []


def test_what_is_kept_does_not_grow_without_snapshots(engine: Restarting) -> None:
    engine.add_adapter("a", SPEC, seed=1)
    with pytest.raises(KeyError):
        engine.drop_adapter("unknown")
    for step in range(LONGEST):
        engine.forward_backward(batch(step % 4, "a"), {"a": GRPO})
        engine.optim_step({"a": HYPER})
        assert len(engine._journal.calls) <= LONGEST
    whole: dict[str, Tensor] = dict(engine.adapter_state("a").tensors)
    kill(engine, 0)
    found = engine.adapter_state("a").tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
