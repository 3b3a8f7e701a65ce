"""Whole runs whose train engine is fsdp: with adapters and without, left alone and killed."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from lorelei.cli.trained_run import TrainedRun
from lorelei.store.check import check_run
from tests.tiny_runs import lorelei, make_workplace, records, start, write_run

STEPS = 4
TWO = {"kind": "fsdp", "data_parallel": 2, "gradient_checkpointing": True}


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    return make_workplace(tmp_path_factory.mktemp("place"), tiny_tokenizer)


def final(folder: Path) -> str:
    """The snapshot after the last step; its name has its digest."""
    assert check_run(folder) == []
    manifest = TrainedRun.read(folder).manifest
    assert manifest.state["finished"] is True
    return manifest.adapters["default"].snapshot


@pytest.mark.slow
def test_a_run_killed_and_resumed_ends_as_one_left_alone(place: Path) -> None:
    write_run(place, "alone", steps=STEPS, train=TWO)
    lorelei(place, "train", "alone.yaml")
    alone = place / "runs/alone"
    assert max(r["kl_sampler"] for r in records(alone, "step")) < 1e-6
    killed = place / "runs/killed"
    process = start(place, "train", "alone.yaml", "name=killed")
    deadline = time.monotonic() + 60
    while not (killed / "manifests/000001.json").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    lorelei(place, "resume", "killed")
    assert final(killed) == final(alone)


@pytest.mark.slow
def test_all_weights_train_on_two_processes_as_on_archon(place: Path) -> None:
    full = {"steps": 2, "lora": {"use_lora": False}, "algo": {"lr": 1e-3, "kl_ctl": 0.05}}
    write_run(place, "full", train=TWO, **full)
    write_run(place, "archon", **full)
    for name in ("full", "archon"):
        lorelei(place, "train", f"{name}.yaml")
    steps, expected = (records(place / "runs" / name, "step") for name in ("full", "archon"))
    for here, there in zip(steps, expected, strict=True):
        assert here["kl_sampler"] < 1e-6
        assert here["grad_norm"] == pytest.approx(there["grad_norm"], rel=1e-4)
    final(place / "runs/full")


def test_what_cannot_run_is_refused_before_anything_starts(place: Path) -> None:
    write_run(place, "refused", train={"kind": "fsdp", "tensor_parallel": 2})
    error = lorelei(place, "train", "refused.yaml", "train.sequence_parallel=2", code=2)
    assert "train.sequence_parallel: 2 together with tensor_parallel: 2" in error
    error = lorelei(place, "train", "refused.yaml", "lora.use_lora=false", code=2)
    assert "train.tensor_parallel: 2 is not allowed with lora.use_lora: false" in error
