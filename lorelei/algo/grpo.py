"""GRPO: advantages by group and a clipped ratio loss.

Source: Shao et al., 2024 (arXiv 2402.03300), with what `clip` and `importance` add. Unlike there,
all tokens weigh the same (`loss_aggregation: sequence` shares a rollout's weight among its tokens),
and by itself there is no divergence from a reference.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lorelei.algo.clip import ClippedAlgorithm


class Grpo(ClippedAlgorithm):
    """Group-relative advantages and a clipped ratio."""

    kind: Literal["grpo"] = Field(default="grpo", description="Which algorithm.")
