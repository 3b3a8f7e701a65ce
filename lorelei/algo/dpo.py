"""DPO: the chosen answer's log-ratio to the reference above that of the rejected one.

Source: Rafailov et al., 2023 (arXiv 2305.18290), eq. 7; label_smoothing, for labels of which a
share is flipped (cDPO): Mitchell, 2023 (ericmitchell.ai/cdpo.pdf), eq. 3; hinge: SLiC-HF, Zhao et
al., 2023 (arXiv 2305.10425), as a loss on DPO's rewards. Shapes: I items, S pairs.

    h       = log current(chosen) / reference(chosen) - log current(rejected) / reference(rejected)
    sigmoid   -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h),   e = label_smoothing
    hinge     max(0, 1 - beta h)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from lorelei.algo.loss import LossItems, LossResult, loss_path
from lorelei.algo.preference import (
    ReferencedAlgorithm,
    comparisons,
    minus_log_sigmoid,
    pair_result,
)
from lorelei.config.errors import FieldError
from lorelei.types import LossSpec

if TYPE_CHECKING:
    from torch import Tensor


class Dpo(ReferencedAlgorithm):
    """Direct preference optimisation."""

    kind: Literal["dpo"] = Field(description="Which algorithm.")
    beta: float = Field(default=0.1, gt=0, description="The smaller, the farther it may move.")
    loss_type: Literal["sigmoid", "hinge"] = Field(
        default="sigmoid", description="The loss of a pair's margin."
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="Share of pairs whose answers are interchanged."
    )

    @model_validator(mode="after")
    def _smoothing_has_effects(self) -> Dpo:
        if self.label_smoothing and self.loss_type == "hinge":
            raise FieldError(
                "label_smoothing",
                f"{self.label_smoothing} does nothing with loss_type: hinge; remove it, or use "
                "sigmoid",
            )
        return self

    def loss(self) -> LossSpec:
        params = {"beta": self.beta}
        if self.label_smoothing:
            params["label_smoothing"] = self.label_smoothing
        path = loss_path(loss if self.loss_type == "sigmoid" else hinge_loss)
        return LossSpec(path=path, params=params, streams=("answer", "reference"))


def loss(
    current_I: Tensor, items: LossItems, *, beta: float, label_smoothing: float = 0.0
) -> LossResult:
    """The logistic loss of each pair."""
    chosen_S, rejected_S = _rewards(current_I, items, beta)
    margin_S = chosen_S - rejected_S
    loss_S = minus_log_sigmoid(margin_S) * (1 - label_smoothing)
    loss_S = loss_S + minus_log_sigmoid(-margin_S) * label_smoothing
    return pair_result(current_I, items, loss_S, (chosen_S, rejected_S))


def hinge_loss(current_I: Tensor, items: LossItems, *, beta: float) -> LossResult:
    """How far each pair's margin is below 1."""
    chosen_S, rejected_S = _rewards(current_I, items, beta)
    loss_S = (1 - (chosen_S - rejected_S)).relu()
    return pair_result(current_I, items, loss_S, (chosen_S, rejected_S))


def _rewards(current_I: Tensor, items: LossItems, beta: float) -> tuple[Tensor, Tensor]:
    """[S] beta times the log-ratios of what is chosen and of what is rejected."""
    ratio_I, found = current_I - items.streams["reference"], comparisons(items)
    return beta * found.chosen(ratio_I), beta * found.rejected(ratio_I)
