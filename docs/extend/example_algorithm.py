"""Advantage-weighted regression: imitate what was sampled, the better the more.

Source: Peng et al., 2019 (arXiv 1910.00177), algorithm 1; their weights are cut at 20, too.
Shapes: S rollouts, T sampled tokens of one, I items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from lorelei.algo.algorithm import PolicyAlgorithm
from lorelei.algo.loss import Estimator, LossItems, LossResult, kl_estimate, loss_path
from lorelei.types import Floats, LossSpec, Rollout

if TYPE_CHECKING:  # settings are read without torch
    from torch import Tensor


class Awr(PolicyAlgorithm):
    """Every token is imitated with the weight exp(advantage / beta)."""

    beta: float = Field(default=1.0, gt=0, description="The smaller, the greedier.")
    max_weight: float = Field(default=20.0, gt=0, description="Larger weights are cut.")
    discount: float = Field(default=1.0, gt=0, le=1, description="Credit lost a token of delay.")

    def credit(self, groups: Sequence[Sequence[Rollout]]) -> list[list[Floats]]:
        """The reward comes behind the last token: the k-th before it has discount^k of it."""
        return [
            [whole * self._discounts(len(whole)) for whole in group]
            for group in super().credit(groups)
        ]

    def _discounts(self, tokens: int) -> Floats:
        return (self.discount ** np.arange(tokens)[::-1]).astype(np.float32)

    def loss(self) -> LossSpec:
        params = {"beta": self.beta, "max_weight": self.max_weight, **self.kl_params()}
        return LossSpec(path=loss_path(loss), params=params, streams=("advantage",))


def loss(
    current_I: Tensor,
    items: LossItems,
    *,
    beta: float,
    max_weight: float,
    kl_ctl: float,
    kl_estimator: Estimator = "k3",
) -> LossResult:
    """Weighted sum of negative log-likelihoods, plus kl_ctl * KL(current, reference)."""
    weight = (items.streams["advantage"] / beta).exp().clamp(max=max_weight)
    item_loss = -weight * current_I
    metrics = {"regression_weight": (weight * items.weight).sum()}
    if (reference := items.streams.get("reference")) is not None:  # there with kl_ctl > 0
        kl = kl_estimate(reference - current_I, kl_estimator)
        item_loss = item_loss + kl_ctl * kl
        metrics["kl_reference"] = (kl.detach() * items.weight).sum()
    return LossResult(total=(item_loss * items.weight).sum(), metrics=metrics)
