"""Losses of our own that workers import by path."""

from __future__ import annotations

import os
import signal

from torch import Tensor

from lorelei.algo.loss import LossItems, LossResult


def likelihood(current_I: Tensor, items: LossItems, *, factor: float) -> LossResult:
    """-factor * weighted sum of log-probabilities."""
    return LossResult(total=-factor * (current_I * items.weight).sum(), metrics={})


def follows(current_I: Tensor, items: LossItems) -> LossResult:
    """Half the weighted squared distance from a stream of our own, number by number."""
    gap_I = current_I - items.streams["teacher"]
    metrics = {"teacher": (items.streams["teacher"] * items.weight).sum()}
    return LossResult(total=(0.5 * gap_I.square() * items.weight).sum(), metrics=metrics)


def refuses(current_I: Tensor, items: LossItems) -> LossResult:
    """Raises what a user is to blame for."""
    raise ValueError("loss: this one refuses")


def breaks(current_I: Tensor, items: LossItems) -> LossResult:
    """Gives what nobody expects."""
    return "no result"  # type: ignore[return-value]  # that is the fault


def infinite(current_I: Tensor, items: LossItems) -> LossResult:
    """A gradient that is not finite."""
    return LossResult(total=(current_I * float("inf")).sum(), metrics={})


def dies(current_I: Tensor, items: LossItems) -> LossResult:
    """The process that computes it is killed."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("it lives")
