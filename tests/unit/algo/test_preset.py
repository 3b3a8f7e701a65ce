"""The learning rate over a run, and the optimizer's other numbers."""

from __future__ import annotations

import math

import pytest

from lorelei.algo.preset import adam_hyper
from lorelei.config.algo import AlgoConfig


def rates(steps: int, **fields: object) -> list[float]:
    algo = AlgoConfig.model_validate({"lr": 1.0, **fields})
    return [adam_hyper(algo, step, steps).lr for step in range(steps)]


def test_a_constant_rate_stays() -> None:
    assert rates(4) == [1.0] * 4


def test_a_warm_up_rises_to_the_peak_and_never_starts_at_zero() -> None:
    assert rates(6, warmup_steps=3) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_a_linear_rate_falls_by_equal_steps_after_the_warm_up() -> None:
    assert rates(4, lr_schedule="linear") == pytest.approx([1, 0.75, 0.5, 0.25])
    got = rates(6, lr_schedule="linear", warmup_steps=2)
    assert got == pytest.approx([1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25])


def test_a_cosine_rate_is_half_way_down_in_the_middle() -> None:
    got = rates(8, lr_schedule="cosine")
    assert got == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)])
    assert got[4] == pytest.approx(0.5) and got[-1] > 0


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 5, 9])
def test_every_rate_is_positive_and_at_most_the_peak(schedule: str, warmup: int) -> None:
    for steps in (1, 2, 7):
        got = rates(steps, lr_schedule=schedule, warmup_steps=warmup)
        assert all(0 < rate <= 1 for rate in got)


def test_the_other_numbers_are_those_of_the_configuration() -> None:
    algo = AlgoConfig(
        lr=3e-4, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.1, gradient_clipping=0.0
    )
    hyper = adam_hyper(algo, 0, 10)
    assert (hyper.lr, hyper.beta1, hyper.beta2) == (3e-4, 0.8, 0.95)
    assert (hyper.eps, hyper.weight_decay, hyper.max_grad_norm) == (1e-6, 0.1, 0.0)
