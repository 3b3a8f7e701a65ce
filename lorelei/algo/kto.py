"""KTO: answers one by one, each desirable or not, against how far the policy has moved.

Source: Ethayarajh et al., 2024 (arXiv 2402.01306), eq. 8. Shapes: I items, S answers.

    desirable     weight (1 - sigmoid(beta (r - z0))),   r = log current(answer) / reference(answer)
    undesirable   weight (1 - sigmoid(beta (z0 - r)))

z0 is the divergence of the policy from the reference, at least 0: the mean of r over the batch's
prompts, each with the answer of the row before it, which is no answer to it. No gradient goes
through z0. It is the stream `kl`, because it is of the whole batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lorelei.algo.loss import LossItems, LossResult, loss_path
from lorelei.algo.preference import ReferencedAlgorithm, comparisons, right
from lorelei.types import LossSpec

if TYPE_CHECKING:
    from torch import Tensor


class Kto(ReferencedAlgorithm):
    """Kahneman-Tversky optimisation."""

    answers = 1
    paired = False

    kind: Literal["kto"] = Field(description="Which algorithm.")
    # of one row there is no answer to another prompt
    batch_size: int = Field(default=4, ge=2, description="Rows (answers) of one step.")
    beta: float = Field(default=0.1, gt=0, description="The smaller, the farther it may move.")
    desirable_weight: float = Field(
        default=1.0, gt=0, description="Weight of answers whose label is true."
    )
    undesirable_weight: float = Field(default=1.0, gt=0, description="Weight of the other answers.")

    def loss(self) -> LossSpec:
        params = {
            "beta": self.beta,
            "desirable_weight": self.desirable_weight,
            "undesirable_weight": self.undesirable_weight,
        }
        streams = ("answer", "reference", "kl")
        return LossSpec(path=loss_path(loss), params=params, streams=streams)


def loss(
    current_I: Tensor,
    items: LossItems,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> LossResult:
    """The weighted sum of the answers' losses. `margin` is positive on the right side of z0."""
    found = comparisons(items)
    first_S = found.index_SL[:, 0]
    sign_S, kl_S = items.streams["answer"][first_S], items.streams["kl"][first_S]
    reward_S = found.both(current_I - items.streams["reference"])
    margin_S = beta * (reward_S - kl_S) * sign_S
    own_S = desirable_weight * (sign_S > 0) + undesirable_weight * (sign_S < 0)
    weight_S = found.both(items.weight)
    seen_S = margin_S.detach()
    reported = {"accuracy": right(seen_S), "margin": seen_S, "kl": kl_S}
    return LossResult(
        total=((-margin_S).sigmoid() * own_S * weight_S).sum(),
        metrics={name: (value_S * weight_S).sum() for name, value_S in reported.items()},
    )
