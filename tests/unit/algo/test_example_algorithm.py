"""The algorithm of docs/extend/algorithm.md against its formula in plain floats."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lorelei.algo.algorithm import PolicyAlgorithm
from lorelei.algo.kinds import algorithm
from lorelei.algo.loss import load_loss
from tests.episodes import rollout, turn
from tests.loss_items import some_items, without

FILE = Path(__file__).parents[3] / "docs" / "extend" / "example_algorithm.py"


def awr(**fields: Any) -> PolicyAlgorithm:
    return algorithm({"kind": f"{FILE}:Awr", **fields})


def test_credit_fades_with_the_distance_from_the_reward() -> None:
    group = [
        rollout(turn([1], [2, 3]), turn([1, 2, 3, 4], [5]), reward=1.0),
        rollout(turn([1], [2]), reward=0.0),
    ]
    first, second = awr(adv_norm=None, discount=0.5).credit([group])[0]
    assert first.tolist() == [0.25, 0.5, 1.0]  # in the order of the turns
    assert second.tolist() == [0.0]
    (whole, _) = awr(adv_norm=None).credit([group])[0]
    assert whole.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "fields", [{}, {"beta": 0.5}, {"max_weight": 1.5}, {"kl_ctl": 0.3}], ids=str
)
def test_the_loss_is_the_papers_weighted_likelihood(fields: dict[str, float]) -> None:
    current, items = some_items()
    spec = awr(**fields).loss()
    items = items if "kl_ctl" in fields else without(items, "reference")
    got = load_loss(spec)(current, items, **spec.params)
    expected = 0.0
    for logprob, advantage, reference, share in zip(
        current.tolist(),
        items.streams["advantage"].tolist(),
        items.streams.get("reference", current).tolist(),
        items.weight.tolist(),
        strict=True,
    ):
        weight = min(math.exp(advantage / fields.get("beta", 1.0)), fields.get("max_weight", 20.0))
        log_ratio = reference - logprob
        kl = math.exp(log_ratio) - 1 - log_ratio
        expected += share * (-weight * logprob + fields.get("kl_ctl", 0.0) * kl)
    assert got.total.item() == pytest.approx(expected, rel=1e-12)
    current.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: load_loss(spec)(x, items, **spec.params).total, current
    )
