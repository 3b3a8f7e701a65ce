"""Advantages of AReaL's files against its formulas, written token by token from its documentation.

There: rewards are (score + bias) * scaling, clipped, then normalised over rollouts. The reward of a
token is minus kl_ctl times its divergence, and the last token of an answer has the rollout's
besides. The advantage of a token is the sum of rewards from it on. Advantages are normalised over
tokens. Means and squares are of all values of a level; the deviation is around the mean that was
subtracted, divides by their number less one, and 1e-5 is added to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from lorelei.algo.grpo import Grpo
from lorelei.run_file import load_config
from lorelei.types import Items
from tests.areal.examples import EXAMPLES, example

GROUP = 4  # gconfig.n_samples of the examples

Tokens = list[list[float]]  # by rollout


def normalised(values: Tokens, norm: dict[str, Any], level_size: dict[str, int]) -> Tokens:
    """Values of rollouts; level_size: how many rollouts in a row share a level's statistic."""

    def parts(level: str | None) -> list[Tokens]:
        size = level_size[level] if level else len(values)
        return [values[i : i + size] for i in range(0, len(values), size)]

    means: Tokens = []
    for part in parts(norm["mean_level"]):
        flat = [x for own in part for x in own]
        for own in part:
            for_each = [(sum(flat) - x) / (len(flat) - 1) for x in own]
            means.append(for_each if norm.get("mean_leave1out") else [fmean(flat)] * len(own))
    if norm["mean_level"] is None:
        means = [[0.0] * len(own) for own in values]
    centred = [[x - m for x, m in zip(*both, strict=True)] for both in zip(values, means, strict=1)]
    if norm["std_level"] is None:
        return centred
    found: Tokens = []
    for first in range(0, len(values), level_size[norm["std_level"]]):
        part = centred[first : first + level_size[norm["std_level"]]]
        flat = [x for own in part for x in own]
        divisor = len(flat) - 1 if norm.get("std_unbiased", True) else len(flat)
        scale = math.sqrt(math.fsum(x * x for x in flat) / divisor) + norm.get("eps", 1e-5)
        found += [[x / scale for x in own] for own in part]
    return found


def oracle(
    scores: Sequence[float],
    lengths: Sequence[int],
    actor: dict[str, Any],
    kl: Tokens | None = None,
) -> Tokens:
    """Advantages of every token."""
    sizes = {"group": GROUP, "batch": len(scores)}
    shifted = [(s + actor["reward_bias"]) * actor["reward_scaling"] for s in scores]
    rewards = [[min(max(x, -20.0), 20.0)] for x in shifted]
    if (norm := actor.get("reward_norm")) is not None:
        rewards = normalised(rewards, norm, sizes)
    advantages: Tokens = []
    for number, ((reward,), length) in enumerate(zip(rewards, lengths, strict=True)):
        own = [-actor["kl_ctl"] * k for k in kl[number]] if kl else [0.0] * length
        own[-1] += reward
        advantages.append([math.fsum(own[t:]) for t in range(length)])
    if (norm := actor.get("adv_norm")) is not None:
        advantages = normalised(advantages, norm, sizes)
    return advantages


def batch(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, lengths from 10 to 300, groups; wrong answers are long."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 2, 8 * GROUP).astype(np.float32)
    lengths = np.where(
        scores > 0, rng.integers(10, 60, 8 * GROUP), rng.integers(90, 301, 8 * GROUP)
    )
    lengths[0], lengths[1] = 10, 300
    return scores, lengths, np.repeat(np.arange(8), GROUP)


def algorithm(name: str, *overrides: str) -> Grpo:
    (experiment,) = load_config(example(name), overrides).experiments()
    assert isinstance(experiment.algo, Grpo)
    return experiment.algo


SHARED = {
    "reward_scaling": 10.0,
    "reward_bias": -0.5,
    "kl_ctl": 0.0,
    "reward_norm": {"mean_level": "group", "std_level": "group"},
    "adv_norm": {"mean_level": "batch", "std_level": "batch"},
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", EXAMPLES)
def test_advantages_of_the_lora_files_are_areals(name: str, seed: int) -> None:
    scores, lengths, groups = batch(seed)
    got = algorithm(name).advantages(scores, groups, lengths)
    expected = [own[0] for own in oracle(scores.tolist(), lengths.tolist(), SHARED)]
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


NORMS: dict[str, dict[str, Any]] = {
    "levels differ": {"reward_norm": {"mean_level": "group", "std_level": "batch"}},
    "no deviation": {"reward_norm": {"mean_level": "group", "std_level": None}},
    "no mean": {"adv_norm": {"mean_level": None, "std_level": "batch"}},
    "by group": {"adv_norm": {"mean_level": "group", "std_level": "group"}},
    "leave one out": {
        "reward_norm": {"mean_level": "group", "std_level": None, "mean_leave1out": True}
    },
    "biased": {
        "adv_norm": {"mean_level": "batch", "std_level": "batch", "std_unbiased": False, "eps": 0.1}
    },
    "leave one token out": {
        "adv_norm": {"mean_level": "batch", "std_level": "batch", "mean_leave1out": True}
    },
}


def flow(section: dict[str, Any]) -> str:
    words = {None: "null", True: "true", False: "false"}
    return ", ".join(f"{k}: {words.get(v, v) if v in words else v}" for k, v in section.items())


@pytest.mark.parametrize("changed", NORMS.values(), ids=NORMS)
def test_other_norms_are_areals_too(changed: dict[str, Any]) -> None:
    scores, lengths, groups = batch(7)
    overrides = [f"actor.{k}={{{flow(v)}, group_size: 4}}" for k, v in changed.items()]
    got = algorithm("gsm8k_grpo_lora", *overrides).advantages(scores, groups, lengths)
    expected = [own[0] for own in oracle(scores.tolist(), lengths.tolist(), SHARED | changed)]
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_divergence_in_the_rewards_is_areals(estimator: str) -> None:
    scores, lengths, groups = batch(11)
    rng = np.random.default_rng(1)
    sampled = [-rng.exponential(1.0, n).astype(np.float32) for n in lengths]
    reference = [-rng.exponential(2.0, n).astype(np.float32) for n in lengths]
    kl: Tokens = []
    for p, q in zip(sampled, reference, strict=True):
        ratios = [float(a) - float(b) for a, b in zip(p, q, strict=True)]
        forms = {
            "k1": ratios,
            "k2": [x * x / 2 for x in ratios],
            "k3": [math.exp(-x) - 1 + x for x in ratios],
        }
        kl.append([min(max(x, -10.0), 10.0) for x in forms[estimator]])
    # no reward_norm: float32 rewards are exact, and what is left is the sum over tokens
    actor = SHARED | {"kl_ctl": 0.05, "reward_norm": None}
    expected = oracle(scores.tolist(), lengths.tolist(), actor, kl)
    overrides = ["actor.kl_ctl=0.05", "actor.reward_norm=null", f"actor.kl_estimator={estimator}"]
    algo = algorithm("gsm8k_grpo_lora", *overrides)
    assert algo.kl_policy == "behaviour", "the sampler's, with the decoupled loss"
    number = int(lengths.sum())
    whole = Items(
        source=np.arange(number),
        target=np.arange(number),
        weight=np.ones(number, np.float32),
        temperature=np.ones(number, np.float32),
        sequence=np.repeat(np.arange(len(lengths)), lengths),
        streams={
            "advantage": np.repeat(algo.advantages(scores, groups, lengths), lengths),
            "behaviour": np.concatenate(sampled),
            "reference": np.concatenate(reference),
        },
    )
    (got,) = algo.with_kl([whole], groups)
    np.testing.assert_allclose(got, np.concatenate(expected), rtol=1e-6, atol=1e-6)


def test_weights_by_tokens_change_signs_that_weights_by_rollouts_give() -> None:
    """One group's rewards are halves; what is long and wrong pulls the mean of tokens below 0."""
    scores = np.array([1, 1, 1, 0, 1, 0, 0, 0], dtype=np.float32)
    lengths = np.array([10, 10, 10, 300, 10, 10, 10, 10])
    groups = np.repeat([0, 1], GROUP)
    algo = algorithm("gsm8k_grpo_lora")
    by_token = algo.advantages(scores, groups, lengths)
    assert algo.adv_norm is not None
    by_rollout = algo.model_copy(
        update={"adv_norm": algo.adv_norm.model_copy(update={"weigh_by": "rollout"})}
    ).advantages(scores, groups, lengths)
    assert (np.sign(by_token) != np.sign(by_rollout)).any()
