"""Advantages, losses and weights against formulas written by hand.

Shapes: S rollouts, I items.
"""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import fmean, pstdev

import numpy as np
import pytest
import torch
from torch import Tensor

from lorelei.algo import grpo, rloo
from lorelei.algo.advantage import normalise
from lorelei.algo.aggregate import item_weights
from lorelei.algo.loss import LossItems, kl_estimate, load_loss
from lorelei.algo.preset import advantages, loss_spec
from lorelei.algo.rloo import leave_one_out
from lorelei.config.algo import AlgoConfig, NormConfig, RejectionSampling
from lorelei.types import LossSpec

REWARDS = np.array([1.0, 0.0, 0.5, 3.0, 3.0, 3.0, -2.0], dtype=np.float32)
GROUPS = np.array([0, 0, 0, 1, 1, 1, 2])


def some_items(seed: int = 0, count: int = 12) -> tuple[Tensor, LossItems]:
    """fp64 items whose ratios lie on both sides of the clip, with both signs of advantage."""
    draw = torch.Generator().manual_seed(seed)

    def normal(scale: float = 1.0) -> Tensor:
        return torch.randn(count, generator=draw, dtype=torch.float64) * scale

    behaviour = normal() - 3
    items = LossItems(
        weight=normal().abs() / count,
        advantage=normal(),
        behaviour=behaviour,
        proximal=behaviour + normal(0.3),
        reference=behaviour + normal(0.3),
        sequence=torch.arange(count) // 3,
    )
    return behaviour + normal(0.4), items


def by_hand(
    current: float,
    proximal: float,
    behaviour: float,
    advantage: float,
    low: float,
    high: float,
    decoupled: bool,
) -> float:
    """One item of the clipped loss, in floats."""
    ratio = math.exp(current - (proximal if decoupled else behaviour))
    clipped = min(max(ratio, 1 - low), 1 + high)
    loss = -min(ratio * advantage, clipped * advantage)
    return loss * math.exp(proximal - behaviour) if decoupled else loss


# --- advantages


def test_group_normalisation_is_the_z_score_of_each_group() -> None:
    got = normalise(REWARDS, GROUPS, "group", "group")
    expected = [(r - 0.5) / (pstdev([1.0, 0.0, 0.5]) + 1e-6) for r in (1.0, 0.0, 0.5)]
    np.testing.assert_allclose(got[:3], expected, rtol=1e-6)
    assert got[3:].tolist() == [0.0] * 4  # equal rewards, and a group of one, teach nothing


def test_mean_and_deviation_have_levels_of_their_own() -> None:
    rewards = REWARDS.tolist()
    batch_std = pstdev(rewards) + 1e-6
    means = [fmean([r for r, g in zip(rewards, GROUPS, strict=True) if g == k]) for k in GROUPS]
    centred = [r - m for r, m in zip(rewards, means, strict=True)]
    # Dr. GRPO (arXiv 2503.20783): no deviation; REINFORCE++ (arXiv 2501.03262): the batch's
    np.testing.assert_allclose(normalise(REWARDS, GROUPS, "group", "none"), centred, rtol=1e-6)
    got = normalise(REWARDS, GROUPS, "group", "batch")
    np.testing.assert_allclose(got, [c / batch_std for c in centred], rtol=1e-6)
    got = normalise(REWARDS, GROUPS, "batch", "batch")
    np.testing.assert_allclose(got, [(r - fmean(rewards)) / batch_std for r in rewards], rtol=1e-6)
    assert normalise(REWARDS, GROUPS, "none", "none").tolist() == rewards


def test_equal_rewards_that_binary_cannot_hold_have_no_advantage() -> None:
    got = normalise(np.full(7, 0.1, dtype=np.float32), np.zeros(7), "group", "group")
    assert np.abs(got).max() < 1e-6


def test_leave_one_out_is_the_reward_less_the_mean_of_the_others() -> None:
    got = leave_one_out(np.array([1.0, 0.0, 0.5], dtype=np.float32))
    np.testing.assert_allclose(got, [1 - 0.25, 0 - 0.75, 0.5 - 0.5], rtol=1e-6)
    assert got.sum() == pytest.approx(0, abs=1e-6)
    # closed form: G / (G - 1) times the distance from the mean
    rewards = np.random.default_rng(0).normal(size=9).astype(np.float32)
    closed = 9 / 8 * (rewards - rewards.mean())
    np.testing.assert_allclose(leave_one_out(rewards), closed, atol=1e-6)


def test_leave_one_out_of_a_single_reward_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 rewards, got 1"):
        leave_one_out(np.ones(1, dtype=np.float32))


def test_a_preset_scales_rewards_takes_its_baseline_and_normalises() -> None:
    pairs, groups = np.array([1.0, 0.0, 4.0, 2.0], dtype=np.float32), np.array([0, 0, 1, 1])
    got = advantages(AlgoConfig(kind="grpo"), pairs, groups)
    np.testing.assert_allclose(got, [1, -1, 1, -1], rtol=1e-5)
    got = advantages(AlgoConfig(kind="rloo"), pairs, groups)
    np.testing.assert_allclose(got, [1, -1, 2, -2], rtol=1e-6)
    scaled = AlgoConfig(kind="rloo", reward_scaling=10.0, reward_bias=-0.5)
    np.testing.assert_allclose(advantages(scaled, pairs, groups), [10, -10, 20, -20], rtol=1e-6)
    plain = AlgoConfig(adv_norm=None, reward_scaling=2.0, reward_bias=1.0)
    assert advantages(plain, pairs, groups).tolist() == [4.0, 2.0, 10.0, 6.0]
    whole = NormConfig(mean_level="batch", std_level="none")
    got = advantages(AlgoConfig(reward_norm=whole, adv_norm=None), pairs, groups)
    np.testing.assert_allclose(got, pairs - pairs.mean(), rtol=1e-6)


def test_a_preset_does_not_write_into_the_rewards() -> None:
    rewards = REWARDS[:6].copy()
    advantages(AlgoConfig(kind="rloo"), rewards, GROUPS[:6])
    np.testing.assert_array_equal(rewards, REWARDS[:6])


# --- weights


def test_weights_sum_to_one_and_share_it_by_token_or_by_sequence() -> None:
    sequence = np.array([4, 4, 4, 7, 9, 9])
    np.testing.assert_allclose(item_weights(sequence, "token"), [1 / 6] * 6)
    expected = [1 / 9, 1 / 9, 1 / 9, 1 / 3, 1 / 6, 1 / 6]
    np.testing.assert_allclose(item_weights(sequence, "sequence"), expected, rtol=1e-6)
    # a rollout of several rows, whose items stand apart, is one sequence
    np.testing.assert_allclose(item_weights(np.array([1, 2, 1]), "sequence"), [0.25, 0.5, 0.25])


# --- losses


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("high", [None, 0.5])
def test_grpo_is_the_clipped_surrogate_written_by_hand(decoupled: bool, high: float | None) -> None:
    current, items = some_items()
    items = replace(items, reference=None)
    assert items.proximal is not None
    result = grpo.loss(current, items, eps_clip=0.2, eps_clip_higher=high, decoupled=decoupled)
    columns = (current, items.proximal, items.behaviour, items.advantage)
    rows = list(zip(*(c.tolist() for c in columns), strict=True))
    losses = [by_hand(*row, 0.2, high or 0.2, decoupled) for row in rows]
    expected = sum(w * x for w, x in zip(items.weight.tolist(), losses, strict=True))
    assert result.total.item() == pytest.approx(expected, rel=1e-12)
    ratios = [math.exp(c - (p if decoupled else b)) for c, p, b, _ in rows]
    outside = [not 0.8 <= r <= 1 + (high or 0.2) for r in ratios]
    clipped = sum(w for w, out in zip(items.weight.tolist(), outside, strict=True) if out)
    assert 0 < sum(outside) < len(outside)
    assert result.metrics["clipped"].item() == pytest.approx(clipped, rel=1e-12)


def test_the_upper_clip_alone_lets_good_tokens_rise_further() -> None:
    """DAPO (arXiv 2503.14476): between 1 + eps and 1 + eps_higher there is still a gradient."""
    current = torch.tensor([math.log(1.25), math.log(1.35), math.log(0.75)], dtype=torch.float64)
    zeros, ones = torch.zeros_like(current), torch.ones_like(current)
    items = LossItems(
        weight=ones,
        advantage=torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64),
        behaviour=zeros,
        proximal=zeros,
        reference=None,
        sequence=torch.arange(3),
    )
    for higher, expected in ((None, [0.0, 0.0, 0.0]), (0.28, [-1.25, 0.0, 0.0])):
        x = current.clone().requires_grad_()
        grpo.loss(x, items, eps_clip=0.2, eps_clip_higher=higher).total.backward()
        assert x.grad is not None
        assert x.grad.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    "params",
    [
        {"decoupled": True},
        {"decoupled": False},
        {"decoupled": True, "kl_ctl": 0.3},
        {"decoupled": True, "reject_above": 1.2, "reject_below": 0.8},
    ],
)
def test_gradients_of_grpo_are_those_of_finite_differences(params: dict[str, float]) -> None:
    current, items = some_items()
    current.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: grpo.loss(x, items, **params).total, current)


def test_gradients_of_rloo_are_those_of_finite_differences() -> None:
    current, items = some_items()
    current.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rloo.loss(x, items, kl_ctl=0.3).total, current)


def test_rloo_on_policy_is_reinforce() -> None:
    current, items = some_items()
    items = replace(items, behaviour=current.clone(), reference=None)
    current.requires_grad_()
    rloo.loss(current, items).total.backward()
    torch.testing.assert_close(current.grad, -items.advantage * items.weight)


def test_plain_and_decoupled_agree_when_the_proximal_policy_sampled() -> None:
    current, items = some_items()
    items = replace(items, proximal=items.behaviour)
    found: list[tuple[Tensor, Tensor | None]] = []
    for decoupled in (True, False):
        x = current.clone().requires_grad_()
        total = grpo.loss(x, items, decoupled=decoupled, kl_ctl=0.1).total
        total.backward()
        found.append((total, x.grad))
    torch.testing.assert_close(found[0], found[1])


def test_recomputed_ratio_ignores_what_the_sampler_says() -> None:
    current, items = some_items()
    lies = replace(items, behaviour=items.behaviour + 3.0)
    totals = [grpo.loss(current, i, decoupled=False, recompute=True).total for i in (items, lies)]
    assert totals[0] == totals[1]
    assert items.proximal is not None
    honest = replace(items, behaviour=items.proximal)  # then all forms are one
    torch.testing.assert_close(totals[0], grpo.loss(current, honest, decoupled=False).total)


def test_without_a_proximal_policy_the_current_one_is_it() -> None:
    current, items = some_items()
    gradients: list[Tensor | None] = []
    for proximal in (None, current.clone()):
        x = current.clone().requires_grad_()
        grpo.loss(x, replace(items, proximal=proximal)).total.backward()
        gradients.append(x.grad)
    assert gradients[0] is not None and gradients[1] is not None
    torch.testing.assert_close(gradients[0], gradients[1])
    # the ratio is 1, so nothing is clipped: REINFORCE with importance weights
    weight = (current - items.behaviour).exp() * items.weight
    torch.testing.assert_close(gradients[0], -items.advantage * weight)


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_rejected_item_gives_no_gradient_even_when_its_ratio_is_infinite(
    decoupled: bool, advantage: float
) -> None:
    current, items = some_items()
    behaviour = items.behaviour.clone()
    behaviour[2], behaviour[5] = -2000.0, 900.0  # ratios of infinity and of zero
    items = replace(
        items,
        advantage=torch.full_like(current, advantage),
        behaviour=behaviour,
        proximal=None,
        reference=torch.full_like(current, -3000.0),
    )
    bounds = {"reject_above": 5.0, "reject_below": 0.01}
    x = current.clone().requires_grad_()
    result = grpo.loss(x, items, decoupled=decoupled, kl_ctl=0.1, **bounds)
    result.total.backward()
    assert x.grad is not None
    assert x.grad[2] == x.grad[5] == 0
    assert torch.isfinite(x.grad).all() and (x.grad != 0).sum() == len(x) - 2
    assert result.metrics["rejected"].item() == pytest.approx(
        (items.weight[2] + items.weight[5]).item()
    )
    # the others are as if the rejected ones were not there
    rest = torch.tensor([i for i in range(len(x)) if i not in (2, 5)])
    names = ("weight", "advantage", "behaviour", "reference", "sequence")
    fewer = replace(items, **{n: getattr(items, n)[rest] for n in names})
    y = current[rest].clone().requires_grad_()
    grpo.loss(y, fewer, decoupled=decoupled, kl_ctl=0.1).total.backward()
    torch.testing.assert_close(x.grad[rest], y.grad)


def test_the_kl_estimate_is_unbiased_and_never_negative() -> None:
    draw = torch.Generator().manual_seed(0)
    p = torch.randn(50, generator=draw, dtype=torch.float64).log_softmax(-1)
    q = torch.randn(50, generator=draw, dtype=torch.float64).log_softmax(-1)
    exact = (p.exp() * (p - q)).sum()
    estimates = kl_estimate(q - p)
    assert (estimates >= 0).all()
    torch.testing.assert_close((p.exp() * estimates).sum(), exact)


def test_kl_weighs_in_with_kl_ctl_and_is_reported() -> None:
    current, items = some_items()
    assert items.reference is not None
    log_ratio = items.reference - current
    kl = ((log_ratio.exp() - 1 - log_ratio) * items.weight).sum()
    for loss in (grpo.loss, rloo.loss):
        without = loss(current, replace(items, reference=None)).total
        result = loss(current, items, kl_ctl=0.5)
        torch.testing.assert_close(result.total - without, 0.5 * kl)
        torch.testing.assert_close(result.metrics["kl_reference"], kl)


def test_a_loss_is_additive_over_any_split_of_its_items() -> None:
    current, items = some_items()
    names = ("weight", "advantage", "behaviour", "proximal", "reference", "sequence")
    for loss in (grpo.loss, rloo.loss):
        whole = loss(current, items, kl_ctl=0.1)
        parts = [
            loss(current[s], replace(items, **{n: getattr(items, n)[s] for n in names}), kl_ctl=0.1)
            for s in (slice(0, 5), slice(5, 12))
        ]
        torch.testing.assert_close(whole.total, parts[0].total + parts[1].total)
        for name, value in whole.metrics.items():
            torch.testing.assert_close(value, parts[0].metrics[name] + parts[1].metrics[name])


@pytest.mark.parametrize(
    "algo",
    [
        AlgoConfig(kind="grpo", rejection_sampling=RejectionSampling(upper=2.0, lower=0.5)),
        AlgoConfig(kind="rloo", kl_ctl=0.1),
    ],
)
def test_the_loss_of_a_preset_takes_its_parameters(algo: AlgoConfig) -> None:
    spec = loss_spec(algo)
    current, items = some_items()
    assert torch.isfinite(load_loss(spec)(current, items, **spec.params).total)


@pytest.mark.parametrize("path", ["", "nowhere", "nowhere:loss", "lorelei.algo.grpo:nothing"])
def test_a_path_that_leads_nowhere_is_named(path: str) -> None:
    with pytest.raises(ValueError, match=f"loss: '{path}' is not 'package.module:function'"):
        load_loss(LossSpec(path=path, params={}))
