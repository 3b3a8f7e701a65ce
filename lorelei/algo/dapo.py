"""DAPO: a higher upper clip, every token the same weight, dynamic sampling, an overlong penalty.

Source: Yu et al., 2025 (arXiv 2503.14476). A preset of grpo's settings. Unlike there, the ratio is
decoupled (`importance`), which on policy is the same.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lorelei.algo.clip import ClippedAlgorithm
from lorelei.algo.overlong import OverlongPenalty


class Dapo(ClippedAlgorithm):
    """GRPO that clips higher and drops prompts which teach nothing."""

    kind: Literal["dapo"] = Field(description="Which algorithm.")
    eps_clip_higher: float | None = Field(
        default=0.28, gt=0, description="Ratios above 1 + it are clipped. null: eps_clip."
    )
    overlong_penalty: OverlongPenalty | None = Field(
        default_factory=OverlongPenalty,
        description="Of scores of answers that are nearly as long as they may be.",
    )
    drop_zero_variance_groups: bool = Field(
        default=True, description="Sample another group for one whose rewards are all equal."
    )
