"""The divergence as a part of token rewards, against sums written by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from lorelei.algo.advantage import NormConfig
from lorelei.algo.grpo import Grpo
from lorelei.algo.kl_reward import kl_of_tokens
from lorelei.algo.rloo import Rloo
from lorelei.types import BASE, CURRENT, Items

KL: dict[str, Any] = {"kl_ctl": 0.5, "use_kl_in_reward": True}


def items(streams: dict[str, list[float]], sequence: list[int]) -> Items:
    n = len(sequence)
    arrays = {name: np.array(values, dtype=np.float32) for name, values in streams.items()}
    return Items(
        source=np.arange(n),
        target=np.arange(n),
        weight=np.ones(n, np.float32),
        temperature=np.ones(n, np.float32),
        sequence=np.array(sequence),
        streams=arrays,
    )


def test_estimates_are_those_of_the_paper() -> None:
    p, q = np.array([-1.0, -2.0, -0.1, -50.0]), np.array([-1.5, -1.0, -90.0, -0.1])
    log_ratio = (p - q).tolist()
    expected = {
        "k1": log_ratio,
        "k2": [x * x / 2 for x in log_ratio],
        "k3": [math.expm1(-x) + x for x in log_ratio],
    }
    for kind, values in expected.items():
        clipped = [min(max(value, -10.0), 10.0) for value in values]
        got = kl_of_tokens(p, q, kind)  # pyright: ignore[reportArgumentType]
        np.testing.assert_allclose(got, clipped, rtol=1e-12)


def test_a_token_pays_for_the_divergence_from_it_on() -> None:
    algo = Grpo(**KL, kl_estimator="k1", adv_norm=None)
    one = items(
        {
            "advantage": [2, 2, 2, -1],
            "behaviour": [-1, -2, -3, -1],
            "reference": [-2, -1, -4, -1],
        },
        [0, 0, 0, 1],
    )
    # k1: 1, -1, 1 | 0
    (got,) = algo.with_kl([one], np.array([0, 0]))
    np.testing.assert_allclose(got, [2 - 0.5, 2 - 0.0, 2 - 0.5, -1], rtol=1e-6)


def test_rounds_are_normalised_together_by_tokens_or_by_rollouts() -> None:
    rng = np.random.default_rng(0)
    rounds, tokens = [], []
    for lengths in ([3, 5], [2, 7]):
        sequence = [n for n, length in enumerate(lengths) for _ in range(length)]
        own = {name: (-rng.random(len(sequence))).tolist() for name in ("behaviour", "reference")}
        own["advantage"] = [float(n) for n in sequence]
        rounds.append(items(own, sequence))
        tokens += lengths
    for weigh_by in ("token", "rollout"):
        norm = NormConfig(mean_level="batch", std_level="batch", weigh_by=weigh_by)
        plain = Rloo(kind="rloo", **KL, adv_norm=None).with_kl(rounds, np.array([0, 0, 1, 1]))
        got = Rloo(kind="rloo", **KL, adv_norm=norm).with_kl(rounds, np.array([0, 0, 1, 1]))
        values = np.concatenate(plain).astype(np.float64)
        share = np.repeat([1 / n for n in tokens], tokens)
        weights = np.ones_like(values) if weigh_by == "token" else share
        mean = np.average(values, weights=weights)
        scale = math.sqrt(np.average((values - mean) ** 2, weights=weights)) + 1e-6
        assert [len(part) for part in got] == [8, 9]
        # the oracle starts from advantages that were rounded to float32
        np.testing.assert_allclose(np.concatenate(got), (values - mean) / scale, rtol=1e-4)


def test_the_policy_is_the_samplers_or_the_trainers_word_for_it() -> None:
    assert Grpo(**KL).kl_policy == "behaviour"
    own = Grpo(**KL, use_decoupled_loss=False, recompute_logprob=True)
    assert own.kl_policy == "proximal"
    assert own.policies == {"reference": BASE, "proximal": CURRENT}
    assert own.loss().params["kl_ctl"] == 0.0
    assert Grpo(kl_ctl=0.5).loss().params["kl_ctl"] == 0.5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_kl_in_reward": True}, "use_kl_in_reward: true does nothing with kl_ctl: 0"),
        ({"kl_estimator": "k1"}, "kl_estimator: k1 does nothing with kl_ctl: 0; raise it"),
    ],
)
def test_a_form_that_does_nothing_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Grpo(**settings)
