"""The clipped surrogate of PPO, with a bound of its own above, and a second one for bad tokens.

Source: Schulman et al., 2017 (arXiv 1707.06347), eq. 7; the separate upper clip: DAPO (arXiv
2503.14476); the dual clip: Ye et al., 2019 (arXiv 1912.09729), eq. 3. Shapes: I items.

    -min(ratio A, clip(ratio, 1 - eps_clip, 1 + eps_clip_higher) A) w
    + kl_ctl KL(current, reference)

the first line not above -c_clip A for A < 0. `importance` says what ratio and w are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from lorelei.algo.importance import RatioAlgorithm, importance, weighed
from lorelei.algo.loss import Loss, LossItems, LossResult
from lorelei.config.errors import FieldError
from lorelei.types import LossSpec

if TYPE_CHECKING:
    from torch import Tensor


class ClippedAlgorithm(RatioAlgorithm):
    """What the kinds have in common whose loss clips the ratio; presets are other defaults."""

    eps_clip: float = Field(default=0.2, gt=0, lt=1, description="Ratios below 1 - it are clipped.")
    eps_clip_higher: float | None = Field(
        default=None, gt=0, description="Ratios above 1 + it are clipped. Default: eps_clip."
    )
    c_clip: float | None = Field(
        default=None,
        gt=1,
        description="Of tokens with a negative advantage, ratios above it are clipped. "
        "Default: not.",
    )

    @model_validator(mode="after")
    def _clips_in_order(self) -> ClippedAlgorithm:
        high = self.eps_clip if self.eps_clip_higher is None else self.eps_clip_higher
        if self.c_clip is not None and self.c_clip <= 1 + high:
            raise FieldError(
                "c_clip", f"{self.c_clip} is within the clip, which ends at {1 + high:g}; raise it"
            )
        return self

    def loss(self) -> LossSpec:
        return self.clipped_loss(loss)

    def clipped_loss(self, function: Loss) -> LossSpec:
        """The spec of a loss that takes what `loss` takes."""
        return self.ratio_loss(
            function,
            eps_clip=self.eps_clip,
            eps_clip_higher=self.eps_clip_higher,
            c_clip=self.c_clip,
        )


def loss(
    current_I: Tensor,
    items: LossItems,
    *,
    eps_clip: float = 0.2,
    eps_clip_higher: float | None = None,
    c_clip: float | None = None,
    **common: Any,
) -> LossResult:
    """The ratio of every token is clipped. common: see `importance`."""
    found = importance(current_I, items, **common)
    bounds = (eps_clip, eps_clip_higher, c_clip)
    surrogate, metrics = clipped(found.log_ratio.exp(), found.advantage, items.weight, bounds)
    return weighed(surrogate, found, metrics)


Bounds = tuple[float, float | None, float | None]


def clipped(
    ratio_I: Tensor, advantage_I: Tensor, weight_I: Tensor, bounds: Bounds
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss [I] of the surrogate, and the shares of ratios that a bound held.

    bounds: eps_clip, eps_clip_higher (None: eps_clip), c_clip (None: none).
    """
    eps_clip, eps_clip_higher, c_clip = bounds
    high = eps_clip if eps_clip_higher is None else eps_clip_higher
    within = ratio_I.clamp(1 - eps_clip, 1 + high)
    metrics = {"clipped": ((ratio_I != within) * weight_I).sum().detach()}
    least = (ratio_I * advantage_I).minimum(within * advantage_I)
    if c_clip is not None:
        floor = c_clip * advantage_I
        held = (advantage_I < 0) & (least < floor)
        least = floor.where(held, least)
        metrics["dual_clipped"] = (held * weight_I).sum()
    return -least, metrics
