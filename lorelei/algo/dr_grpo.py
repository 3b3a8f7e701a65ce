"""Dr. GRPO: GRPO without the two divisions that favour some lengths and some prompts.

Source: Liu et al., 2025 (arXiv 2503.20783), section 3.2. A preset of grpo's settings: advantages
are reward - mean of the group, and a rollout's sum over tokens is divided by a constant.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lorelei.algo.advantage import NormConfig
from lorelei.algo.clip import ClippedAlgorithm
from lorelei.algo.loss import Aggregation


class DrGrpo(ClippedAlgorithm):
    """Centred rewards, and a sum over tokens."""

    kind: Literal["dr_grpo"] = Field(description="Which algorithm.")
    loss_aggregation: Aggregation = Field(
        default="constant", description="How tokens are weighed; constant: all of every batch."
    )
    adv_norm: NormConfig | None = Field(
        default_factory=lambda: NormConfig(std_level="none"),
        description="Normalise advantages. Default: the mean of the group only.",
    )
