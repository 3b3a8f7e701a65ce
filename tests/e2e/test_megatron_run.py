"""Whole runs with Megatron as the train engine, on tiny random models."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lorelei.cli.trained_run import TrainedRun
from lorelei.store.check import check_run
from tests.environments import needs
from tests.tiny_models import make_tiny
from tests.tiny_runs import lorelei, make_workplace, records, start, write_run

pytestmark = needs("megatron")


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    folder = make_workplace(tmp_path_factory.mktemp("place"), tiny_tokenizer)
    tiny_tokenizer.save_pretrained(make_tiny("qwen3_moe", folder / "experts"))
    return folder


@pytest.mark.brief
def test_experts_on_two_ranks_train_asynchronously_under_the_canary(place: Path) -> None:
    write_run(
        place,
        "experts",
        model="./experts",
        steps=5,
        train={"kind": "megatron", "data_parallel": 2, "expert_parallel": 2},
        rollout={"max_head_offpolicyness": 2},
        publish={"canary": {"tokens": 48}},
    )
    lorelei(place, "train", "experts.yaml")
    folder = place / "runs" / "experts"
    assert check_run(folder) == []
    steps = records(folder, "step")
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5]
    assert max(r["staleness_max"] for r in steps) <= 2
    tensors = TrainedRun.read(folder).state("default").tensors
    moved = {n for n, t in tensors.items() if "lora_B" in n and t.any()}
    for expert in range(4):  # those of both ranks
        assert any(f".experts.{expert}." in name for name in moved), expert


def test_a_killed_run_resumes_and_ends_as_if_nothing_had_been(place: Path) -> None:
    layout: dict[str, Any] = {"kind": "megatron", "tensor_parallel": 2}
    lora = {"target_modules": ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]}
    write_run(place, "left", steps=4, train=layout, lora=lora)
    write_run(place, "killed", steps=4, train=layout, lora=lora)
    process = start(place, "train", "killed.yaml")
    manifests = place / "runs" / "killed" / "manifests"
    deadline = time.monotonic() + 100
    while not any(int(p.stem) >= 2 for p in manifests.glob("*.json")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    lorelei(place, "train", "left.yaml")
    lorelei(place, "resume", "killed")
    one, other = (TrainedRun.read(place / "runs" / n).state("default") for n in ("left", "killed"))
    assert check_run(place / "runs" / "killed") == []
    assert one.digest() == other.digest()
