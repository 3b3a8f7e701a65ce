"""Whose log-probabilities they are: nearest of several, as far as the noise lets tell."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest

from lorelei.publish.verdict import distance, judge, share_of_way
from lorelei.types import Floats

TOKENS = 64
RNG = np.random.default_rng(0)
RIGHT = RNG.normal(-2, 1, TOKENS).astype(np.float32)


def moved(nats: float, seed: int = 1, start: Floats = RIGHT) -> Floats:
    """Another policy, `nats` away."""
    step = np.random.default_rng(seed).normal(0, 1, TOKENS)
    return (start + nats * step / np.sqrt(np.mean(step**2))).astype(np.float32)


def test_distance_is_a_root_mean_square_and_infinite_for_what_is_no_number() -> None:
    assert distance(RIGHT, RIGHT) == 0
    assert distance(moved(0.25), RIGHT) == pytest.approx(0.25, rel=1e-4)
    assert distance(RIGHT[:-1], RIGHT) == inf
    assert distance(np.full_like(RIGHT, np.nan), RIGHT) == inf


@pytest.mark.parametrize("noise", [1e-5, 1e-3, 0.05])
@pytest.mark.parametrize("step", [1.1, 3.0])  # times the noise
def test_the_right_answer_holds_and_another_version_does_not(noise: float, step: float) -> None:
    before, base = moved(step * noise, 2), moved(20 * noise, 3)
    others = {"version 1": before, "base": base}
    wrong = 0
    for seed in range(200):
        honest = judge(moved(noise, 100 + seed), RIGHT, others, noise)
        assert honest.holds and honest.distinguishable == {"version 1", "base"}
        wrong += judge(moved(noise, 100 + seed, before), RIGHT, others, noise).taken_for is None
    assert wrong == 0


def test_a_step_below_the_noise_is_not_distinguishable_and_holds() -> None:
    others = {"version 1": moved(0.002, 2)}
    for scored in (moved(0.05, 5), moved(0.05, 5, others["version 1"])):
        verdict = judge(scored, RIGHT, others, noise=0.05)
        assert verdict.holds and verdict.distinguishable == frozenset()


def test_an_untrained_adapter_is_the_base_and_holds() -> None:
    verdict = judge(moved(1e-6), RIGHT, {"base": RIGHT}, noise=0.0)
    assert verdict.holds and verdict.distinguishable == frozenset()


def test_an_answer_of_nobody_is_refused_even_where_the_right_policy_is_nearest() -> None:
    verdict = judge(moved(0.1), RIGHT, {"base": moved(1.0, 3)}, noise=1e-5)
    assert verdict.taken_for is None and not verdict.holds


def test_answers_that_are_not_numbers_are_refused() -> None:
    nan = np.full_like(RIGHT, np.nan)
    assert not judge(nan, RIGHT, {"base": moved(1.0, 3)}, noise=0.1).holds


def test_the_share_of_the_way_is_zero_at_the_start_and_one_at_the_end() -> None:
    end = moved(1.0)
    half = (RIGHT + end) / 2
    shares = [share_of_way(x, RIGHT, end) for x in (RIGHT, half, end)]
    np.testing.assert_allclose(shares, [0, 0.5, 1], atol=1e-6)
