"""Advantages against formulas written by hand.

Shapes: S rollouts.
"""

from __future__ import annotations

from statistics import fmean, pstdev, stdev
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from lorelei.algo.advantage import Level, NormConfig
from lorelei.algo.grpo import Grpo
from lorelei.algo.rloo import Rloo

REWARDS = np.array([1.0, 0.0, 0.5, 3.0, 3.0, 3.0, -2.0], dtype=np.float32)
GROUPS = np.array([0, 0, 0, 1, 1, 1, 2])


def levels(mean: Level, std: Level, **more: Any) -> NormConfig:
    return NormConfig(mean_level=mean, std_level=std, **more)


def test_group_normalisation_is_the_z_score_of_each_group() -> None:
    got = levels("group", "group")(REWARDS, GROUPS)
    expected = [(r - 0.5) / (pstdev([1.0, 0.0, 0.5]) + 1e-6) for r in (1.0, 0.0, 0.5)]
    np.testing.assert_allclose(got[:3], expected, rtol=1e-6)
    assert got[3:].tolist() == [0.0] * 4  # equal rewards, and a group of one, teach nothing


def test_mean_and_deviation_have_levels_of_their_own() -> None:
    rewards = REWARDS.tolist()
    batch_std = pstdev(rewards) + 1e-6
    means = [fmean([r for r, g in zip(rewards, GROUPS, strict=True) if g == k]) for k in GROUPS]
    centred = [r - m for r, m in zip(rewards, means, strict=True)]
    # Dr. GRPO (arXiv 2503.20783): no deviation; REINFORCE++ (arXiv 2501.03262): the batch's
    np.testing.assert_allclose(levels("group", "none")(REWARDS, GROUPS), centred, rtol=1e-6)
    got = levels("group", "batch")(REWARDS, GROUPS)
    np.testing.assert_allclose(got, [c / batch_std for c in centred], rtol=1e-6)
    got = levels("batch", "batch")(REWARDS, GROUPS)
    np.testing.assert_allclose(got, [(r - fmean(rewards)) / batch_std for r in rewards], rtol=1e-6)
    assert levels("none", "none")(REWARDS, GROUPS).tolist() == rewards


def test_equal_rewards_that_binary_cannot_hold_have_no_advantage() -> None:
    got = levels("group", "group")(np.full(7, 0.1, dtype=np.float32), np.zeros(7))
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


def test_weighed_by_tokens_a_rollout_counts_as_often_as_it_has_tokens() -> None:
    tokens = np.array([10, 300, 40, 7, 80, 120, 55])
    spread = [r for r, n in zip(REWARDS.tolist(), tokens.tolist(), strict=True) for _ in range(n)]
    scale = stdev(spread) + 1e-5
    norm = levels("batch", "batch", weigh_by="token", std_unbiased=True, eps=1e-5)
    got = norm(REWARDS, GROUPS, tokens)
    np.testing.assert_allclose(got, [(r - fmean(spread)) / scale for r in REWARDS], rtol=1e-6)
    algo = Grpo(adv_norm=norm)
    np.testing.assert_array_equal(algo.advantages(REWARDS, GROUPS, tokens), got)
    # a long wrong answer among short right ones: rollouts and tokens disagree on the sign
    scores, lengths = np.array([1.0, 1.0, 0.0, 0.5], np.float32), np.array([5, 5, 400, 40])
    by_rollout = levels("batch", "batch")(scores, np.zeros(4))
    by_token = levels("batch", "batch", weigh_by="token")(scores, np.zeros(4), lengths)
    assert by_rollout[3] < 0 < by_token[3]


def test_a_mean_may_leave_out_the_value_that_it_is_subtracted_from() -> None:
    got = levels("group", "none", mean_leave1out=True)(REWARDS, GROUPS)
    np.testing.assert_allclose(got[:3], [1 - 0.25, 0 - 0.75, 0.5 - 0.5], rtol=1e-6)
    assert got[6] == -2.0, "nothing is left of a group of one"
    by_rloo = Rloo(kind="rloo").advantages(REWARDS[:6], GROUPS[:6])
    np.testing.assert_allclose(got[:6], by_rloo, rtol=1e-6)


def test_a_deviation_may_be_the_one_around_the_mean_that_is_subtracted() -> None:
    pairs, groups = np.array([1.0, 0.0, 4.0, 2.0], dtype=np.float32), np.array([0, 0, 1, 1])
    norm = levels("group", "batch", std_around="subtracted_mean", eps=0)
    spread = ((0.25 + 0.25 + 1 + 1) / 4) ** 0.5
    np.testing.assert_allclose(norm(pairs, groups), np.array([0.5, -0.5, 1, -1]) / spread)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"std_level": "none", "std_unbiased": True}, "std_unbiased: True does nothing with"),
        ({"std_level": "none", "eps": 1e-5}, "eps: 1e-05 does nothing with std_level: none"),
        ({"mean_level": "none", "mean_leave1out": True}, "mean_leave1out: true does nothing"),
    ],
)
def test_a_setting_of_what_is_not_taken_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        NormConfig(**settings)


def test_rewards_are_clipped_after_scaling() -> None:
    algo = Grpo(reward_scaling=10.0, reward_bias=-0.5, reward_clip=20.0, adv_norm=None)
    scores = np.array([1.0, 0.0, 7.0, -9.0], dtype=np.float32)
    assert algo.advantages(scores, np.zeros(4)).tolist() == [5.0, -5.0, 20.0, -20.0]
