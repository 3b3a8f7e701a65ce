"""M2PO: of a stale batch, only the tokens that are furthest off-policy are left out.

Source: Zheng et al., 2025 (arXiv 2510.01161). Shapes: I items.

    -M ratio A,  ratio = current / behaviour
    M = 0 for the tokens with the largest (log proximal - log behaviour)^2, as few as leave the
    others a mean of it below m2_threshold

Unlike there, M is found once, over the whole batch and before its first update, so that
micro-batches and processes change nothing; and it judges tokens of either sign of advantage, as
AReaL does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from lorelei.algo.importance import RatioAlgorithm, importance, weighed
from lorelei.algo.loss import LossItems, LossResult
from lorelei.types import CURRENT, Floats, Items, Longs, LossSpec, Policy

if TYPE_CHECKING:
    from torch import Tensor


class M2po(RatioAlgorithm):
    """An unclipped ratio under a bound on its second moment."""

    kind: Literal["m2po"] = Field(description="Which algorithm.")
    use_decoupled_loss: bool = Field(
        default=False,
        description="The ratio is to the proximal policy, weighed by proximal / behaviour.",
    )
    m2_threshold: float = Field(
        default=0.04, gt=0, description="Highest mean of squared log ratios of what is trained on."
    )

    @property
    def policies(self) -> Mapping[str, Policy]:
        return {**super().policies, "proximal": CURRENT}

    @property
    def credit_reads_policies(self) -> bool:
        return True

    def with_policies(self, rounds: Sequence[Items], groups_S: Longs) -> list[Floats]:
        """The advantages, zero where M is."""
        if self.use_kl_in_reward:
            found = self.with_kl(rounds, groups_S)
        else:
            found = [items.streams["advantage"] for items in rounds]
        log_ratio_I = np.concatenate(
            [items.streams["proximal"] - items.streams["behaviour"] for items in rounds]
        )
        kept_I = within_second_moment(log_ratio_I, self.m2_threshold)
        parts = np.split(kept_I, np.cumsum([len(items) for items in rounds])[:-1])
        return [own * kept for own, kept in zip(found, parts, strict=True)]

    def loss(self) -> LossSpec:
        return self.ratio_loss(loss)


def within_second_moment(log_ratio_I: Floats, threshold: float) -> NDArray[np.bool_]:
    """[I] M: the most items whose squares have a mean below the threshold, at least one."""
    squares = np.square(log_ratio_I.astype(np.float64))
    order = np.argsort(squares, kind="stable")
    means = np.cumsum(squares[order]) / np.arange(1, len(squares) + 1)
    kept = np.zeros(len(squares), dtype=np.bool_)
    kept[order[: max(int((means < threshold).sum()), 1)]] = True
    return kept


def loss(current_I: Tensor, items: LossItems, **common: Any) -> LossResult:
    """The ratio of every token, whose advantage is 0 where M is. common: see `importance`."""
    found = importance(current_I, items, **common)
    return weighed(-found.log_ratio.exp() * found.advantage, found, {})
