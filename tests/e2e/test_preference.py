"""Preference runs from the command line: learnt, stopped, resumed, beside supervised ones."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedTokenizerFast

from tests.tiny_runs import final, lorelei, make_workplace, records, start

PAIRS, LABELS = "pairs.jsonl", "labels.jsonl"


@pytest.fixture
def place(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A workplace with preferences: who is right names the number."""
    make_workplace(tmp_path, tiny_tokenizer)
    pairs = [
        {"prompt": f"Say {n}.", "chosen": f"It is {n}", "rejected": f"No: {n}"} for n in range(64)
    ]
    labels = [
        {
            "prompt": p["prompt"],
            "completion": p["chosen" if n % 2 else "rejected"],
            "label": n % 2 == 1,
        }
        for n, p in enumerate(pairs)
    ]
    for name, rows in ((PAIRS, pairs), (LABELS, labels)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def write(place: Path, name: str, kind: str = "dpo", **sections: Any) -> None:
    config = {
        "model": "./model",
        "steps": 6,
        "threads": 1,
        "lora": {"lora_rank": 4, "lora_alpha": 8},
        "task": {"kind": "jsonl", "path": LABELS if kind == "kto" else PAIRS},
        "algo": {"kind": kind, "batch_size": 4},
        "optimizer": {"lr": 1.0e-2},
        "eval": {"every": 3, "n_prompts": 8},
        **sections,
    }
    (place / f"{name}.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_preferences_are_learnt_and_scored_alike_by_both_engines(place: Path, kind: str) -> None:
    write(place, "run", kind)
    assert f"default: {kind} on " in lorelei(place, "train", "run.yaml")
    folder = place / "runs" / "run"
    first, *_, last = (r["scores"] for r in records(folder, "eval"))
    assert first["accuracy"] == pytest.approx(0.5) and last["accuracy"] > 0.9
    assert last["loss"] < first["loss"] and last["margin"] > 0.1
    steps = records(folder, "step")
    assert [(s["step"], s["version"]) for s in steps][-1] == (6, 2)
    assert {"loss", "accuracy", "margin", "grad_norm"} <= steps[-1].keys()
    lorelei(place, "check", "runs/run")
    scored = json.loads(lorelei(place, "eval", "runs/run", "--base", "--json"))["default"]
    assert scored["v2"] == pytest.approx(last, rel=1e-3, abs=1e-3)
    assert scored["base"] == pytest.approx(first, rel=1e-3, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_preference_run_that_was_stopped_ends_with_the_same_bits(place: Path, kind: str) -> None:
    for name in ("whole", "parts"):
        write(place, name, kind, steps=40)
    lorelei(place, "train", "whole.yaml")
    process = start(place, "train", "parts.yaml")
    assert process.stdout is not None
    while not process.stdout.readline().startswith("step 5/"):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    lorelei(place, "resume", "runs/parts")
    whole, parts = (final(place / "runs" / name) for name in ("whole", "parts"))
    assert whole == parts, "step and sha256 of tensors and moments"


def test_adapters_that_compare_learn_beside_one_that_imitates(place: Path) -> None:
    """Every objective, in one run: one base, and one mixed pass a step."""
    compared = {kind: {"algo": {"kind": kind}} for kind in ("dpo", "ipo", "orpo", "simpo")}
    labelled = {"kto": {"algo": {"kind": "kto"}, "task": {"path": LABELS}}}
    taught = {"sft": {"algo": {"kind": "sft"}, "task": {"path": "rows.jsonl"}, "steps": 4}}
    write(place, "all", adapters={**compared, **labelled, **taught})
    lorelei(place, "train", "all.yaml")
    evals = records(place / "runs" / "all", "eval")
    for kind in (*compared, *labelled, *taught):
        losses = [r["scores"]["loss"] for r in evals if r["adapter"] == kind]
        assert losses[-1] < losses[0], kind


@pytest.mark.parametrize(
    ("kind", "sections", "said"),
    [
        ("dpo", {"task": {"kind": "jsonl", "path": LABELS}}, "no column 'chosen'"),
        ("kto", {"task": {"kind": "jsonl", "path": PAIRS}}, "no column 'completion'"),
        ("dpo", {"reward": {"kind": "math_verify"}}, "reward: has no effect with algo.kind: dpo"),
        ("dpo", {"algo": {"kind": "dpo", "gamma": 1}}, "gamma: has no effect with kind: dpo, only"),
        (
            "dpo",
            {"task": {"kind": "jsonl", "path": PAIRS, "answer_field": "gold"}},
            "task.answer_field: 'gold' has no effect with algo.kind: dpo",
        ),
        (
            "dpo",
            {"algo": {"kind": "dpo", "loss_type": "hinge", "label_smoothing": 0.1}},
            "algo.label_smoothing: 0.1 does nothing with loss_type: hinge",
        ),
        ("kto", {"algo": {"kind": "kto", "batch_size": 1}}, "algo.batch_size: 1"),
        ("dpo", {"task": {"kind": "reasoning_gym", "name": "chain_sum"}}, "reasoning_gym"),
    ],
)
def test_what_a_preference_run_cannot_use_is_one_line(
    place: Path, kind: str, sections: dict[str, Any], said: str
) -> None:
    write(place, "bad", kind, **sections)
    error = lorelei(place, "train", "bad.yaml", code=2)
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
    assert not (place / "runs").exists()
