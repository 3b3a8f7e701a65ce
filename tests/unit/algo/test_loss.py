"""Weights, and what holds for the loss of every algorithm.

Shapes: I items.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from lorelei.algo import cispo, clip, gspo, m2po, rloo, sapo, sft
from lorelei.algo.loss import (
    Loss,
    item_weights,
    kl_estimate,
    load_loss,
    loss_path,
    sequence_max,
    sequence_mean,
    sequence_sum,
)
from lorelei.types import LossSpec
from tests.loss_items import some_items, taken, without

RATIO_LOSSES = (clip.loss, gspo.loss, gspo.token_loss, cispo.loss, sapo.loss, m2po.loss)
FORMS = ("decoupled", "recomputed", "plain")
POLICY_LOSSES = (*(partial(one, form=f) for one in RATIO_LOSSES for f in FORMS), rloo.loss)
LOSSES = (*POLICY_LOSSES, sft.loss)
# a weight, or an answer's own ratio, has no gradient there; differences see one
WITHOUT_ONE = (cispo.loss, gspo.token_loss)


def function(loss: Loss) -> Loss:
    return loss.func if isinstance(loss, partial) else loss


def name(loss: Loss) -> str:
    form = loss.keywords["form"] if isinstance(loss, partial) else ""
    return f"{loss_path(function(loss)).removeprefix('lorelei.algo.')} {form}".strip()


def test_weights_sum_to_one_and_share_it_by_token_or_by_sequence() -> None:
    sequence = np.array([4, 4, 4, 7, 9, 9])
    np.testing.assert_allclose(item_weights(sequence, "token"), [1 / 6] * 6)
    expected = [1 / 9, 1 / 9, 1 / 9, 1 / 3, 1 / 6, 1 / 6]
    np.testing.assert_allclose(item_weights(sequence, "sequence"), expected, rtol=1e-6)
    # a rollout of several rows, whose items stand apart, is one sequence
    np.testing.assert_allclose(item_weights(np.array([1, 2, 1]), "sequence"), [0.25, 0.5, 0.25])


@pytest.mark.parametrize(
    "loss", [one for one in LOSSES if function(one) not in WITHOUT_ONE], ids=name
)
def test_gradients_are_those_of_finite_differences(loss: Loss) -> None:
    current, items = some_items()
    current.requires_grad_()
    params = {"kl_ctl": 0.3} if loss in POLICY_LOSSES else {}
    assert torch.autograd.gradcheck(lambda x: loss(x, items, **params).total, current)


@pytest.mark.parametrize("loss", LOSSES, ids=name)
def test_a_loss_is_additive_over_any_split_of_its_sequences(loss: Loss) -> None:
    current, items = some_items()
    params = {"kl_ctl": 0.1} if loss in POLICY_LOSSES else {}
    whole = loss(current, items, **params)
    parts = [
        # whole sequences
        loss(current[s], taken(items, s), **params)
        for s in (slice(0, 6), slice(6, len(current)))
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


def test_a_divergence_has_the_estimate_that_is_asked_for() -> None:
    log_ratio = torch.tensor([-0.5, 0.0, 1.5], dtype=torch.float64)
    torch.testing.assert_close(kl_estimate(log_ratio, "k1"), -log_ratio)
    torch.testing.assert_close(kl_estimate(log_ratio, "k2"), log_ratio**2 / 2)
    torch.testing.assert_close(kl_estimate(log_ratio), log_ratio.exp() - 1 - log_ratio)


def test_sequences_are_summed_wherever_their_items_stand() -> None:
    values = torch.tensor([1.0, 5.0, -2.0, 4.0], dtype=torch.float64)
    sequence = torch.tensor([7, 3, 7, 7])
    assert sequence_sum(values, sequence).tolist() == [3.0, 5.0, 3.0, 3.0]
    assert sequence_mean(values, sequence).tolist() == [1.0, 5.0, 1.0, 1.0]
    assert sequence_max(values, sequence).tolist() == [4.0, 5.0, 4.0, 4.0]
    kept = torch.tensor([True, False, False, True])
    assert sequence_mean(values, sequence, kept).tolist() == [2.5, 0.0, 2.5, 2.5]


def test_constant_weights_do_not_depend_on_how_long_answers_are() -> None:
    assert item_weights(np.array([0, 0, 1]), "constant", 8).tolist() == [1 / 16] * 3


@pytest.mark.parametrize("path", ["", "nowhere", "nowhere:loss", "lorelei.algo.grpo:nothing"])
def test_a_path_that_leads_nowhere_is_named(path: str) -> None:
    with pytest.raises(ValueError, match=f"loss: '{path}' is not 'package.module:function'"):
        load_loss(LossSpec(path=path, params={}))
