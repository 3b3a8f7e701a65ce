"""SAPO: a soft gate around a ratio of one in the place of a clip.

Source: Gao et al., 2025 (arXiv 2511.20347), eqs. 5 and 6. Shapes: I items.

    -(4 / tau) sigmoid(tau (ratio - 1)) A,  tau = tau_pos where A > 0, else tau_neg

`importance` says what ratio it is; by itself the one to the policy that sampled. At a ratio of 1
its gradient is that of the ratio itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from lorelei.algo.importance import RatioAlgorithm, importance, weighed
from lorelei.algo.loss import Aggregation, LossItems, LossResult
from lorelei.types import LossSpec

if TYPE_CHECKING:
    from torch import Tensor


class Sapo(RatioAlgorithm):
    """A gate that closes sooner for tokens which are to become less likely."""

    kind: Literal["sapo"] = Field(description="Which algorithm.")
    use_decoupled_loss: bool = Field(
        default=False,
        description="The ratio is to the proximal policy, weighed by proximal / behaviour.",
    )
    loss_aggregation: Aggregation = Field(
        default="sequence",
        description="Every rollout, or every token, has the same weight; constant: a token's does "
        "not depend on how many there are.",
    )
    tau_pos: float = Field(
        default=1.0, gt=0, description="How sharp the gate of positive advantages is."
    )
    tau_neg: float = Field(default=1.05, gt=0, description="That of negative advantages.")

    def loss(self) -> LossSpec:
        return self.ratio_loss(loss, tau_pos=self.tau_pos, tau_neg=self.tau_neg)


def loss(
    current_I: Tensor,
    items: LossItems,
    *,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    **common: Any,
) -> LossResult:
    """The gate of every token's ratio. common: see `importance`."""
    found = importance(current_I, items, **common)
    advantage = found.advantage
    tau = advantage.new_full((), tau_pos).where(advantage > 0, advantage.new_full((), tau_neg))
    gate = (tau * (found.log_ratio.exp() - 1)).sigmoid() * 4 / tau
    return weighed(-gate * advantage, found, {})
