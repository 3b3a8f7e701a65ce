"""What a scorer is and what a reward is. Nothing here or in the scorers imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardResult:
    """A finite value, or none and the reason.

    `error` starts with one of a few fixed kinds, up to the first colon: 'timeout', 'crashed',
    'not started', 'raised <Exception>', 'not a number'.
    """

    value: float | None
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    error: str | None = None


class Reward(Protocol):
    """Turns a completion into a reward; RewardPool is one."""

    async def score(self, prompt_data: Mapping[str, Any], completion_text: str) -> RewardResult:
        """Never raises for what the reward does."""
        ...


class Scorer(Protocol):
    """Scores one completion inside a reward worker; what it returns or raises is checked there."""

    def __call__(self, data: Mapping[str, Any], completion: str) -> object:
        """A number, or (number, {metric: number}). `data` is Prompt.data."""
        ...
