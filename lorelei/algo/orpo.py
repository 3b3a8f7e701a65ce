"""ORPO: the likelihood of the chosen answer, and its odds above those of the rejected one.

Source: Hong et al., 2024 (arXiv 2403.07691), eq. 6 and 7. No reference. Shapes: I items, S pairs.

    -m(chosen) - beta log sigmoid(log odds(chosen) - log odds(rejected))

    m = mean log-probability of an answer's tokens,   odds = exp(m) / (1 - exp(m))

The likelihood is that of the answer's tokens, as in the paper's formula; TRL's also counts those of
the prompt.
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

SURE = -1e-7  # the highest mean log-probability whose odds are finite in float32


class Orpo(PreferenceAlgorithm):
    """Odds ratio preference optimisation."""

    kind: Literal["orpo"] = Field(description="Which algorithm.")
    beta: float = Field(
        default=0.1, gt=0, description="Weight of the odds ratio; the paper's lambda."
    )

    def loss(self) -> LossSpec:
        return LossSpec(path=loss_path(loss), params={"beta": self.beta}, streams=("answer",))


def loss(current_I: Tensor, items: LossItems, *, beta: float) -> LossResult:
    """Likelihood and odds ratio of each pair."""
    chosen_S, rejected_S = comparisons(items).means(current_I)
    ratio_S = _log_odds(chosen_S) - _log_odds(rejected_S)
    loss_S = beta * minus_log_sigmoid(ratio_S) - chosen_S
    return pair_result(current_I, items, loss_S, (beta * chosen_S, beta * rejected_S))


def _log_odds(mean_S: Tensor) -> Tensor:
    mean_S = mean_S.clamp(max=SURE)
    return mean_S - (-mean_S.expm1()).log()
