"""DAPO's soft penalty on answers that nearly reach the limit.

Source: Yu et al., 2025 (arXiv 2503.14476), eq. 13.
"""

from __future__ import annotations

from pydantic import Field

from lorelei.config.section import Section


class OverlongPenalty(Section):
    """Grows from 0 to `factor` over the last tokens before the limit."""

    buffer: int | None = Field(
        default=None,
        ge=1,
        description="Over how many tokens before the limit it grows. "
        "Default: a fifth of rollout.max_new_tokens.",
    )
    factor: float = Field(default=1.0, gt=0, description="What is subtracted at the limit.")

    def __call__(self, tokens: int, limit: int) -> float:
        """What an answer's score changes by: 0, or less. limit: the longest answer."""
        buffer = self.buffer or max(limit // 5, 1)
        beyond = tokens - (limit - buffer)
        return -self.factor * min(max(beyond / buffer, 0.0), 1.0)
