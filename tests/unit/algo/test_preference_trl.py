"""Losses on preferences against TRL's own on the same log-probabilities.

tests/fixtures/trl/preference.py wrote what TRL says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorelei.algo.kinds import algorithm
from lorelei.jobs.preference import with_kl
from lorelei.train.batch import comparison_batch
from lorelei.train.items import measured
from lorelei.types import Batch, Comparison, Floats

FIXTURE = Path(__file__).parents[2] / "fixtures" / "trl" / "preference.json"
TRL: Mapping[str, Any] = json.loads(FIXTURE.read_text())
PAIRS, LABELLED = TRL["pairs"], TRL["labelled"]
FP32 = 1e-5


def flat(*columns: Sequence[Sequence[float]]) -> Floats:
    """The tokens of answers in the order of a batch: of each row, one column after the other."""
    rows = zip(*columns, strict=True)
    return np.array([x for row in rows for answer in row for x in answer], np.float32)


def batch_of(signs: Sequence[Sequence[int]], *columns: Sequence[Sequence[float]]) -> Batch:
    """Comparisons whose answers are as long as those of the columns."""
    rows = [
        Comparison(
            id=str(number),
            prompt=np.array([1, 2], np.int32),
            answers=tuple(np.arange(len(answer), dtype=np.int32) for answer in answers),
            signs=tuple(own),
        )
        for number, (own, answers) in enumerate(zip(signs, zip(*columns, strict=True), strict=True))
    ]
    return comparison_batch("a", rows)


def of_pairs(**algo: Any) -> dict[str, float]:
    """What our loss says of the pairs."""
    batch = batch_of([(1, -1)] * len(PAIRS["chosen"]), PAIRS["chosen"], PAIRS["rejected"])
    reference = flat(PAIRS["chosen_reference"], PAIRS["rejected_reference"])
    batch.items.streams["reference"] = reference  # type: ignore[index]
    return measured(batch.items, algorithm(algo).loss(), flat(PAIRS["chosen"], PAIRS["rejected"]))


@pytest.mark.parametrize(
    ("name", "algo"),
    [
        ("dpo", {"kind": "dpo"}),
        ("hinge", {"kind": "dpo", "loss_type": "hinge"}),
        ("ipo", {"kind": "ipo"}),
    ],
)
def test_dpo_and_its_variants(name: str, algo: Mapping[str, Any]) -> None:
    found = of_pairs(beta=0.4, **algo)
    assert found["loss"] == pytest.approx(TRL[name]["loss"], rel=FP32)
    if name == "ipo":  # TRL reports rewards of sums, and compares means
        return
    theirs = TRL[name]["metrics"]
    for ours, name in (
        ("accuracy", "rewards/accuracies"),
        ("margin", "rewards/margins"),
        ("chosen_reward", "rewards/chosen"),
        ("rejected_reward", "rewards/rejected"),
        ("chosen_logprob", "logps/chosen"),
        ("rejected_logprob", "logps/rejected"),
    ):
        assert found[ours] == pytest.approx(theirs[name], rel=FP32)


def test_smoothed_dpo() -> None:
    found = of_pairs(kind="dpo", beta=0.4, label_smoothing=0.2)
    assert found["loss"] == pytest.approx(TRL["cdpo"], rel=FP32)


def test_simpo() -> None:
    found = of_pairs(kind="simpo", beta=2.0, gamma=0.7)
    assert found["loss"] == pytest.approx(TRL["simpo"], rel=FP32)


def test_orpo_but_for_the_likelihood_of_prompts_which_trl_counts() -> None:
    likelihood = np.mean([np.mean(answer) for answer in PAIRS["chosen"]])
    expected = -likelihood - np.mean(TRL["orpo_odds"])
    assert of_pairs(kind="orpo", beta=0.3)["loss"] == pytest.approx(expected, rel=FP32)


def test_kto_and_how_far_the_policy_has_moved() -> None:
    signs = [(sign,) for sign in LABELLED["signs"]]
    others = batch_of(signs, LABELLED["mismatched"])
    batch = with_kl(
        batch_of(signs, LABELLED["current"]),
        others,
        flat(LABELLED["mismatched"]),
        flat(LABELLED["mismatched_reference"]),
    )
    batch.items.streams["reference"] = flat(LABELLED["reference"])  # type: ignore[index]
    algo = {"kind": "kto", "beta": 0.4, "desirable_weight": 1.5, "undesirable_weight": 0.5}
    found = measured(batch.items, algorithm(algo).loss(), flat(LABELLED["current"]))
    assert TRL["kto"]["kl"] > 0.1
    assert found["kl"] == pytest.approx(TRL["kto"]["kl"], rel=FP32)
    assert found["loss"] == pytest.approx(TRL["kto"]["loss"], rel=FP32)
