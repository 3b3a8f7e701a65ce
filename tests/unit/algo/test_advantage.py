"""Advantages against formulas written by hand.

Shapes: S rollouts.
"""

from __future__ import annotations

from statistics import fmean, pstdev

import numpy as np
import pytest

from lorelei.algo.advantage import NormConfig, normalise
from lorelei.algo.grpo import Grpo
from lorelei.algo.rloo import Rloo

REWARDS = np.array([1.0, 0.0, 0.5, 3.0, 3.0, 3.0, -2.0], dtype=np.float32)
GROUPS = np.array([0, 0, 0, 1, 1, 1, 2])


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


def test_rewards_are_scaled_then_a_baseline_is_taken_then_they_are_normalised() -> None:
    pairs, groups = np.array([1.0, 0.0, 4.0, 2.0], dtype=np.float32), np.array([0, 0, 1, 1])
    np.testing.assert_allclose(Grpo().advantages(pairs, groups), [1, -1, 1, -1], rtol=1e-5)
    got = Rloo(kind="rloo").advantages(pairs, groups)
    np.testing.assert_allclose(got, [1, -1, 2, -2], rtol=1e-6)
    scaled = Rloo(kind="rloo", reward_scaling=10.0)
    np.testing.assert_allclose(scaled.advantages(pairs, groups), [10, -10, 20, -20], rtol=1e-6)
    plain = Grpo(adv_norm=None, reward_scaling=2.0, reward_bias=1.0)
    assert plain.advantages(pairs, groups).tolist() == [4.0, 2.0, 10.0, 6.0]
    whole = NormConfig(mean_level="batch", std_level="none")
    got = Grpo(reward_norm=whole, adv_norm=None).advantages(pairs, groups)
    np.testing.assert_allclose(got, pairs - pairs.mean(), rtol=1e-6)


@pytest.mark.parametrize("algo", [Grpo(), Grpo(adv_norm=None), Rloo(kind="rloo")])
def test_advantages_are_not_written_into_the_rewards(algo: Grpo | Rloo) -> None:
    rewards = REWARDS[:6].copy()
    algo.advantages(rewards, GROUPS[:6])
    np.testing.assert_array_equal(rewards, REWARDS[:6])
