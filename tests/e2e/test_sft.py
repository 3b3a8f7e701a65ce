"""Supervised runs from the command line: trained, stopped, resumed, beside RL."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import yaml
from transformers import PreTrainedTokenizerFast

from lorelei.cli.trained_run import TrainedRun
from tests.tiny_runs import lorelei, make_workplace, records, start, tiny_run


@pytest.fixture
def place(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    return make_workplace(tmp_path, tiny_tokenizer)


def write(place: Path, name: str, **sections: object) -> None:
    config = {
        "model": "./model",
        "steps": 4,
        "threads": 1,
        "lora": {"lora_rank": 4, "lora_alpha": 8},
        "task": {"kind": "jsonl", "path": "rows.jsonl"},
        "algo": {"kind": "sft", "batch_size": 4},
        "optimizer": {"lr": 1.0e-2},
        "eval": {"every": 2, "n_prompts": 4},
        **sections,
    }
    (place / f"{name}.yaml").write_text(yaml.safe_dump(config))


def final(folder: Path, adapter: str) -> str:
    return TrainedRun.read(folder).manifest.adapters[adapter].snapshot


def test_a_supervised_run_learns_is_published_when_it_is_evaluated_and_can_be_used(
    place: Path,
) -> None:
    write(place, "taught")
    out = lorelei(place, "train", "taught.yaml")
    assert "default: sft on " in out and "4 rows, 4 steps" in out
    folder = place / "runs" / "taught"
    losses = [r["scores"]["loss"] for r in records(folder, "eval")]
    assert len(losses) == 3 and losses[0] > losses[-1]
    steps = records(folder, "step")
    assert [(s["step"], s["version"]) for s in steps] == [(1, 0), (2, 1), (3, 1), (4, 2)]
    assert "taught" in lorelei(place, "runs")
    lorelei(place, "check", "runs/taught")
    scored = lorelei(place, "eval", "runs/taught", "--base").split()
    assert scored[:3] == ["default", "base", "loss"] and scored[4:7] == ["default", "v2", "loss"]
    # the inference engine and the train engine say the same of it
    assert float(scored[7]) == pytest.approx(losses[-1], abs=1e-3)
    assert float(scored[3]) == pytest.approx(losses[0], abs=1e-3)
    assert lorelei(place, "export", "runs/taught").strip().endswith("default-v2")


@pytest.mark.slow
def test_a_supervised_run_that_was_stopped_ends_with_the_same_bits(place: Path) -> None:
    for name in ("whole", "parts"):
        write(place, name, steps=40)
    lorelei(place, "train", "whole.yaml")
    process = start(place, "train", "parts.yaml")
    assert process.stdout is not None
    while not process.stdout.readline().startswith("step 5/"):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    lorelei(place, "resume", "runs/parts")
    whole, parts = (final(place / "runs" / name, "default") for name in ("whole", "parts"))
    assert whole == parts, "step and sha256 of tensors and moments"


def test_an_adapter_is_taught_while_another_is_rewarded(place: Path) -> None:
    config = tiny_run(adapters={"rewarded": {}, "taught": {"algo": {"kind": "sft"}, "steps": 5}})
    (place / "both.yaml").write_text(yaml.safe_dump(config))
    lorelei(place, "train", "both.yaml")
    folder = place / "runs" / "both"
    last = {r["adapter"]: r["step"] for r in records(folder, "step")}
    assert last == {"rewarded": 3, "taught": 5}
    assert {r["adapter"] for r in records(folder, "eval")} == {"rewarded", "taught"}


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"reward": {"kind": "math_verify"}}, "reward: has no effect with algo.kind: sft"),
        ({"task": {"kind": "reasoning_gym", "name": "chain_sum"}}, "reasoning_gym"),
        ({"task": {"kind": "jsonl", "path": "rows.jsonl", "answer_field": "gold"}}, "'gold'"),
    ],
)
def test_what_a_supervised_run_cannot_use_is_one_line(
    place: Path, sections: dict[str, object], said: str
) -> None:
    write(place, "bad", **sections)
    error = lorelei(place, "train", "bad.yaml", code=2)
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
    assert not (place / "runs").exists()
