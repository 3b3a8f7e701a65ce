"""IPO: the difference of a pair's log-ratios is drawn to a fixed margin, not ever farther.

Source: Azar et al., 2023 (arXiv 2310.12036), eq. 17. Shapes: I items, S pairs.

    (h - 1 / (2 beta))^2,   h as in DPO, with means over an answer's tokens in place of sums

The paper writes sums; its authors used means, as TRL records, and with sums the margin would depend
on the answers' lengths.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lorelei.algo.loss import LossItems, LossResult, loss_path
from lorelei.algo.preference import ReferencedAlgorithm, comparisons, pair_result
from lorelei.types import LossSpec

if TYPE_CHECKING:
    from torch import Tensor


class Ipo(ReferencedAlgorithm):
    """Identity preference optimisation."""

    kind: Literal["ipo"] = Field(description="Which algorithm.")
    beta: float = Field(
        default=0.1, gt=0, description="The margin is 1 / (2 beta); the paper's tau."
    )

    def loss(self) -> LossSpec:
        streams = ("answer", "reference")
        return LossSpec(path=loss_path(loss), params={"beta": self.beta}, streams=streams)


def loss(current_I: Tensor, items: LossItems, *, beta: float) -> LossResult:
    """The squared distance of each pair's difference from the margin."""
    found = comparisons(items)
    chosen_S, rejected_S = found.means(current_I - items.streams["reference"])
    loss_S = (chosen_S - rejected_S - 1 / (2 * beta)).square()
    return pair_result(current_I, items, loss_S, (beta * chosen_S, beta * rejected_S))
