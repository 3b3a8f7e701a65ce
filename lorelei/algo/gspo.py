"""GSPO: the ratio of a whole answer, to the power of one over its length, is clipped.

Source: Zheng et al., 2025 (arXiv 2507.18071), eqs. 5 and 7; GSPO-token: eq. 13. Shapes: I items.

    s = exp(mean over its tokens of (current - anchor)),  A: the mean over its tokens
    gspo         -min(s A, clip(s) A) of every answer
    gspo_token   the same of every token, with its own A and s_t = sg(s) pi / sg(pi)

`importance` says what the anchor is and how an answer is weighed; tokens that it leaves out count
in no mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from lorelei.algo.clip import ClippedAlgorithm, clipped
from lorelei.algo.importance import importance, weighed
from lorelei.algo.loss import Aggregation, LossItems, LossResult, sequence_mean
from lorelei.types import LossSpec

if TYPE_CHECKING:
    from torch import Tensor


class SequenceRatio(ClippedAlgorithm):
    """The settings of both forms; ratios of answers move far less than those of tokens."""

    eps_clip: float = Field(
        default=3e-4, gt=0, lt=1, description="Ratios below 1 - it are clipped."
    )
    eps_clip_higher: float | None = Field(
        default=4e-4, gt=0, description="Ratios above 1 + it are clipped. null: eps_clip."
    )
    loss_aggregation: Aggregation = Field(
        default="sequence",
        description="Every answer, or every token, has the same weight; constant: a token's does "
        "not depend on how many there are.",
    )


class Gspo(SequenceRatio):
    """One ratio for a whole answer."""

    kind: Literal["gspo"] = Field(description="Which algorithm.")

    def loss(self) -> LossSpec:
        return self.clipped_loss(loss)


class GspoToken(SequenceRatio):
    """An answer's ratio with the gradient of each token, for advantages that differ by token."""

    kind: Literal["gspo_token"] = Field(description="Which algorithm.")

    def loss(self) -> LossSpec:
        return self.clipped_loss(token_loss)


def loss(
    current_I: Tensor,
    items: LossItems,
    *,
    eps_clip: float = 3e-4,
    eps_clip_higher: float | None = None,
    c_clip: float | None = None,
    **common: Any,
) -> LossResult:
    """Every token has its answer's ratio and advantage. common: see `importance`."""
    found = importance(current_I, items, **common)
    ratio = sequence_mean(found.log_ratio, items.sequence, found.kept).exp()
    advantage = sequence_mean(found.advantage, items.sequence, found.kept)
    bounds = (eps_clip, eps_clip_higher, c_clip)
    surrogate, metrics = clipped(ratio, advantage, items.weight, bounds)
    return weighed(surrogate, found, metrics)


def token_loss(
    current_I: Tensor,
    items: LossItems,
    *,
    eps_clip: float = 3e-4,
    eps_clip_higher: float | None = None,
    c_clip: float | None = None,
    **common: Any,
) -> LossResult:
    """Every token has its answer's ratio, and its own gradient and advantage."""
    found = importance(current_I, items, **common)
    mean = sequence_mean(found.log_ratio.detach(), items.sequence, found.kept)
    own = found.log_ratio - found.log_ratio.detach()  # zero, with a gradient
    bounds = (eps_clip, eps_clip_higher, c_clip)
    surrogate, metrics = clipped((mean + own).exp(), found.advantage, items.weight, bounds)
    return weighed(surrogate, found, metrics)
