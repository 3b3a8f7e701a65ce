"""RLOO: leave-one-out advantages and the REINFORCE loss on them.

Source: Ahmadian et al., 2024 (arXiv 2402.14740). Shapes: S rollouts, G of one group, I items.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from lorelei.algo.advantage import Level, NormConfig
from lorelei.algo.algorithm import PolicyAlgorithm
from lorelei.algo.loss import Estimator, LossItems, LossResult, kl_estimate, loss_path
from lorelei.types import Floats, Longs, LossSpec

if TYPE_CHECKING:
    from torch import Tensor


class Rloo(PolicyAlgorithm):
    """Each reward less the mean of the others of its group."""

    kind: Literal["rloo"] = Field(description="Which algorithm.")
    adv_norm: NormConfig | None = Field(
        default=None,
        description="Normalise advantages. Default: not, the baseline is the normalisation.",
    )

    @property
    def statistics(self) -> frozenset[Level]:
        return super().statistics | frozenset[Level](("group",))

    def baseline(self, values_S: Floats, groups_S: Longs) -> Floats:
        values = values_S.copy()
        for group in np.unique(groups_S):
            members = groups_S == group
            values[members] = leave_one_out(values[members])
        return values

    def loss(self) -> LossSpec:
        streams = ("advantage", "behaviour")
        return LossSpec(path=loss_path(loss), params=self.kl_params(), streams=streams)


def leave_one_out(rewards_G: Floats) -> Floats:
    """Each reward less the mean of the others.

    rewards_G: [G]. Returns [G]. Raises ValueError for G < 2. Source: eq. 7 of the paper.
    """
    if len(rewards_G) < 2:
        raise ValueError(f"rloo: a group needs at least 2 rewards, got {len(rewards_G)}")
    others = (rewards_G.sum() - rewards_G) / (len(rewards_G) - 1)
    return (rewards_G - others).astype(np.float32)


def loss(
    current_I: Tensor, items: LossItems, *, kl_ctl: float = 0.0, kl_estimator: Estimator = "k3"
) -> LossResult:
    """Weighted sum of -ratio A; ratio = current / behaviour is 1 on policy: REINFORCE."""
    item_loss = -(current_I - items.streams["behaviour"]).exp() * items.streams["advantage"]
    metrics: dict[str, Tensor] = {}
    if (reference := items.streams.get("reference")) is not None:
        kl = kl_estimate(reference - current_I, kl_estimator)
        if kl_ctl:  # else it is in the rewards
            item_loss = item_loss + kl_ctl * kl
        metrics["kl_reference"] = (kl.detach() * items.weight).sum()
    return LossResult(total=(item_loss * items.weight).sum(), metrics=metrics)
