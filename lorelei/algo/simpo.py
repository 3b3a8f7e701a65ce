"""SimPO: the mean log-probability of the chosen answer above that of the rejected one by a margin.

Source: Meng et al., 2024 (arXiv 2405.14734), eq. 6. No reference. Shapes: I items, S pairs.

    -log sigmoid(beta (m(chosen) - m(rejected)) - gamma),   m = mean over an answer's tokens
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lorelei.algo.loss import LossItems, LossResult, loss_path
from lorelei.algo.preference import (
    PreferenceAlgorithm,
    comparisons,
    minus_log_sigmoid,
    pair_result,
)
from lorelei.types import LossSpec

if TYPE_CHECKING:
    from torch import Tensor


class Simpo(PreferenceAlgorithm):
    """Simple preference optimisation."""

    kind: Literal["simpo"] = Field(description="Which algorithm.")
    beta: float = Field(default=2.0, gt=0, description="Scale of mean log-probabilities.")
    gamma: float = Field(default=1.0, ge=0, description="The margin of rewards to reach.")

    def loss(self) -> LossSpec:
        params = {"beta": self.beta, "gamma": self.gamma}
        return LossSpec(path=loss_path(loss), params=params, streams=("answer",))


def loss(current_I: Tensor, items: LossItems, *, beta: float, gamma: float) -> LossResult:
    """The logistic loss of each pair's margin above gamma."""
    chosen_S, rejected_S = (beta * mean_S for mean_S in comparisons(items).means(current_I))
    loss_S = minus_log_sigmoid(chosen_S - rejected_S - gamma)
    return pair_result(current_I, items, loss_S, (chosen_S, rejected_S))
