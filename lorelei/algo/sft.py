"""Supervised fine-tuning: the likelihood of answers that are given.

Source: Ouyang et al., 2022 (arXiv 2203.02155), section 3.5. Shapes: I items.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lorelei.algo.algorithm import Algorithm
from lorelei.algo.loss import LossItems, LossResult, loss_path
from lorelei.types import LossSpec

if TYPE_CHECKING:
    from torch import Tensor


class Sft(Algorithm):
    """Maximum likelihood of the assistant's tokens; the tokens of prompts have no loss."""

    job = "sft"

    kind: Literal["sft"] = Field(description="Which algorithm.")
    loss_on: Literal["answer", "assistant_turns"] = Field(
        default="answer",
        description="What is learnt of a chat: the assistant's last message, or all of its own.",
    )
    weight_field: str | None = Field(
        default=None, description="The column with a row's weight in the loss. Default: 1."
    )

    def loss(self) -> LossSpec:
        return LossSpec(path=loss_path(loss), params={})


def loss(current_I: Tensor, items: LossItems) -> LossResult:
    """Weighted sum of negative log-likelihoods."""
    return LossResult(total=-(current_I * items.weight).sum(), metrics={})
