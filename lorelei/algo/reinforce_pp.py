"""REINFORCE++: rewards normalised over the whole batch, and the clipped surrogate.

Source: Hu et al., 2025 (arXiv 2501.03262). A preset of grpo's settings; with `baseline_of: group`
each reward is less its group's mean first (REINFORCE++-baseline). Unlike there, no divergence is
subtracted by itself: that is `kl_ctl: 0.01, use_kl_in_reward: true, kl_estimator: k1`, and of the
baseline form `kl_ctl: 0.01, kl_estimator: k2`.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from lorelei.algo.advantage import Level, NormConfig
from lorelei.algo.clip import ClippedAlgorithm
from lorelei.types import Floats, Longs

MEAN = NormConfig(std_level="none")


def of_all_tokens() -> NormConfig:
    """The mean and the deviation of the batch, in which every token counts."""
    return NormConfig(mean_level="batch", std_level="batch", weigh_by="token")


class ReinforcePlusPlus(ClippedAlgorithm):
    """One normalisation over all tokens of a batch."""

    kind: Literal["reinforce_pp"] = Field(description="Which algorithm.")
    baseline_of: Literal["none", "group"] = Field(
        default="none",
        description="group: subtract the mean of its group from each reward, before the batch's.",
    )
    adv_norm: NormConfig | None = Field(
        default_factory=of_all_tokens,
        description="Normalise advantages. Default: over the tokens of the batch.",
    )

    @property
    def statistics(self) -> frozenset[Level]:
        own: tuple[Level, ...] = ("group",) if self.baseline_of == "group" else ()
        return super().statistics | frozenset(own)

    def baseline(self, values_S: Floats, groups_S: Longs) -> Floats:
        if self.baseline_of == "none":
            return values_S
        return np.asarray(MEAN(values_S, groups_S), dtype=np.float32)
