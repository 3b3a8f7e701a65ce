"""Weights, and what holds for the loss of every algorithm.

Shapes: I items.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lorelei.algo import rloo, sft
from lorelei.algo.grpo import decoupled_loss, plain_loss, recomputed_loss
from lorelei.algo.loss import Loss, item_weights, kl_estimate, load_loss, loss_path
from lorelei.types import LossSpec
from tests.loss_items import some_items, taken, without

POLICY_LOSSES = (decoupled_loss, recomputed_loss, plain_loss, rloo.loss)
LOSSES = (*POLICY_LOSSES, sft.loss)


def name(loss: Loss) -> str:
    return loss_path(loss).removeprefix("lorelei.algo.")


def test_weights_sum_to_one_and_share_it_by_token_or_by_sequence() -> None:
    sequence = np.array([4, 4, 4, 7, 9, 9])
    np.testing.assert_allclose(item_weights(sequence, "token"), [1 / 6] * 6)
    expected = [1 / 9, 1 / 9, 1 / 9, 1 / 3, 1 / 6, 1 / 6]
    np.testing.assert_allclose(item_weights(sequence, "sequence"), expected, rtol=1e-6)
    # a rollout of several rows, whose items stand apart, is one sequence
    np.testing.assert_allclose(item_weights(np.array([1, 2, 1]), "sequence"), [0.25, 0.5, 0.25])


@pytest.mark.parametrize("loss", LOSSES, ids=name)
def test_gradients_are_those_of_finite_differences(loss: Loss) -> None:
    current, items = some_items()
    current.requires_grad_()
    params = {"kl_ctl": 0.3} if loss in POLICY_LOSSES else {}
    assert torch.autograd.gradcheck(lambda x: loss(x, items, **params).total, current)


@pytest.mark.parametrize("loss", LOSSES, ids=name)
def test_a_loss_is_additive_over_any_split_of_its_items(loss: Loss) -> None:
    current, items = some_items()
    params = {"kl_ctl": 0.1} if loss in POLICY_LOSSES else {}
    whole = loss(current, items, **params)
    parts = [
        loss(current[s], taken(items, s), **params) for s in (slice(0, 5), slice(5, len(current)))
    ]
    torch.testing.assert_close(whole.total, parts[0].total + parts[1].total)
    for key, value in whole.metrics.items():
        torch.testing.assert_close(value, parts[0].metrics[key] + parts[1].metrics[key])


def test_the_kl_estimate_is_unbiased_and_never_negative() -> None:
    draw = torch.Generator().manual_seed(0)
    p = torch.randn(50, generator=draw, dtype=torch.float64).log_softmax(-1)
    q = torch.randn(50, generator=draw, dtype=torch.float64).log_softmax(-1)
    exact = (p.exp() * (p - q)).sum()
    estimates = kl_estimate(q - p)
    assert (estimates >= 0).all()
    torch.testing.assert_close((p.exp() * estimates).sum(), exact)


@pytest.mark.parametrize("loss", POLICY_LOSSES, ids=name)
def test_kl_weighs_in_with_kl_ctl_and_is_reported(loss: Loss) -> None:
    current, items = some_items()
    log_ratio = items.streams["reference"] - current
    kl = ((log_ratio.exp() - 1 - log_ratio) * items.weight).sum()
    plain = loss(current, without(items, "reference"))
    result = loss(current, items, kl_ctl=0.5)
    torch.testing.assert_close(result.total - plain.total, 0.5 * kl)
    torch.testing.assert_close(result.metrics["kl_reference"], kl)
    assert "kl_reference" not in plain.metrics


@pytest.mark.parametrize("path", ["", "nowhere", "nowhere:loss", "lorelei.algo.grpo:nothing"])
def test_a_path_that_leads_nowhere_is_named(path: str) -> None:
    with pytest.raises(ValueError, match=f"loss: '{path}' is not 'package.module:function'"):
        load_loss(LossSpec(path=path, params={}))
