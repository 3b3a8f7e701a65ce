"""CISPO: the ratio is clipped as a weight, so that no token loses its gradient.

Source: MiniMax, 2025 (arXiv 2506.13585), eqs. 4 and 5. Shapes: I items.

    -sg(clip(ratio, 1 - eps_clip, 1 + eps_clip_higher)) A log pi(current)

`importance` says what ratio it is; by itself the one to the policy that sampled, so that the clip
bounds the whole weight. The paper gives no number for the upper bound and has no lower one; 5 in
all is that of ScaleRL (arXiv 2510.13786).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from lorelei.algo.importance import RatioAlgorithm, importance, weighed
from lorelei.algo.loss import LossItems, LossResult
from lorelei.types import LossSpec

if TYPE_CHECKING:
    from torch import Tensor


class Cispo(RatioAlgorithm):
    """REINFORCE with bounded importance weights."""

    kind: Literal["cispo"] = Field(description="Which algorithm.")
    use_decoupled_loss: bool = Field(
        default=False,
        description="The ratio is to the proximal policy, weighed by proximal / behaviour.",
    )
    eps_clip: float | None = Field(
        default=None, gt=0, lt=1, description="Weights below 1 - it are brought there. null: none."
    )
    eps_clip_higher: float = Field(
        default=4.0, gt=0, description="Weights above 1 + it are brought there."
    )

    def loss(self) -> LossSpec:
        return self.ratio_loss(loss, eps_clip=self.eps_clip, eps_clip_higher=self.eps_clip_higher)


def loss(
    current_I: Tensor,
    items: LossItems,
    *,
    eps_clip: float = 1.0,
    eps_clip_higher: float = 4.0,
    **common: Any,
) -> LossResult:
    """The likelihood of tokens, weighed. common: see `importance`."""
    found = importance(current_I, items, **common)
    ratio = found.log_ratio.detach().exp()
    within = ratio.clamp(1 - eps_clip, 1 + eps_clip_higher)
    metrics = {"clipped": ((ratio != within) * items.weight).sum()}
    # what is left out has no gradient either, however small its probability
    logprob = current_I.where(found.kept, current_I.new_zeros(()))
    return weighed(-within * found.advantage * logprob, found, metrics)
