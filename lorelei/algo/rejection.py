"""How far the trainer's policy may be from the one that sampled: bounds and weights.

Truncated weights: Espeholt et al., 2018 (arXiv 1802.01561); leaving out what is too far: AReaL
(arXiv 2505.24298). Shapes: I items.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from lorelei.algo.loss import sequence_max, sequence_mean, sequence_sum
from lorelei.config.errors import FieldError
from lorelei.config.section import Section

if TYPE_CHECKING:
    from torch import Tensor

Metric = Literal["ratio", "kl_k1", "kl_k2", "kl_k3"]


class RejectionSampling(Section):
    """Bounds on the ratio of proximal to behaviour probability, or on their divergence."""

    level: Literal["token", "sequence"] = Field(
        default="token", description="Tokens are judged one by one, or all of a rollout together."
    )
    action: Literal["mask", "clamp"] = Field(
        default="mask",
        description="What is outside is left out, or its weight (of the decoupled loss) is "
        "brought to the bound.",
    )
    metric: Metric = Field(
        default="ratio",
        description="What the bounds are on: the ratio, or an estimate of the divergence.",
    )
    agg: Literal["mean", "sum", "max"] = Field(
        default="mean",
        description="What of its tokens counts for a rollout; of ratios the mean and the sum are "
        "of their logarithms, and such a ratio is the weight of all its tokens.",
    )
    upper: float | None = Field(default=None, gt=0, description="Highest value kept.")
    lower: float | None = Field(default=None, ge=0, description="Lowest value kept.")

    @model_validator(mode="after")
    def _keeps_something(self) -> RejectionSampling:
        if self.upper is None and self.lower is None:
            raise FieldError("upper", "give upper, lower or both")
        if self.upper is not None and self.lower is not None and self.lower >= self.upper:
            raise FieldError("lower", f"{self.lower} is not below upper: {self.upper}")
        return self

    @model_validator(mode="after")
    def _has_effects(self) -> RejectionSampling:
        if self.agg != "mean" and self.level == "token":
            raise FieldError("agg", f"{self.agg} does nothing with level: token; remove it")
        if self.action == "clamp" and self.metric != "ratio":
            raise FieldError(
                "metric", f"{self.metric} gives no weight that action: clamp could bound; use ratio"
            )
        if self.action == "clamp" and self.agg == "max":
            raise FieldError("agg", "max is no weight that action: clamp could bound; use mean")
        return self

    def params(self) -> dict[str, Any]:
        """Those of `corrected` that are not its defaults."""
        return self.model_dump(exclude_defaults=True, exclude_none=True)


def corrected(
    log_ratio_I: Tensor,
    sequence_I: Tensor,
    *,
    upper: float = float("inf"),
    lower: float = float("-inf"),
    level: str = "token",
    action: str = "mask",
    metric: str = "ratio",
    agg: str = "mean",
) -> tuple[Tensor, Tensor]:
    """The weight of every item, and which are kept. log_ratio: log proximal - log behaviour."""
    weight = log_ratio_I.exp()
    by_sequence = level == "sequence"
    if by_sequence and metric == "ratio":
        combine = sequence_sum if agg == "sum" else sequence_mean
        weight = combine(log_ratio_I, sequence_I).exp()
    if action == "clamp":
        return weight.clamp(lower, upper), weight == weight
    judged = weight
    if metric != "ratio":
        judged = _divergence(log_ratio_I, metric)
        if by_sequence:
            combine = {"mean": sequence_mean, "sum": sequence_sum, "max": sequence_max}[agg]
            judged = combine(judged, sequence_I)
    elif by_sequence and agg == "max":
        judged = sequence_max(log_ratio_I, sequence_I).exp()
    return weight, (judged <= upper) & (judged >= lower)


def _divergence(log_ratio_I: Tensor, metric: str) -> Tensor:
    """Schulman's estimates (joschu.net/blog/kl-approx.html), signed as AReaL has them."""
    if metric == "kl_k1":
        return log_ratio_I
    if metric == "kl_k2":
        return log_ratio_I * log_ratio_I / 2
    return (-log_ratio_I).expm1() + log_ratio_I
