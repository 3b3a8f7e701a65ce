"""What a scorer is and what a reward is. Neither this file nor a scorer imports torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Protocol, cast


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardResult:
    """A finite value, or None and the reason.

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


class NoReward:
    """The Reward of a run whose environment gives the reward itself."""

    async def score(self, prompt_data: object, completion_text: str) -> RewardResult:
        """See Reward: no value, with the reason."""
        return RewardResult(
            value=None, error="no reward: the environment gave none, and reward.kind is env"
        )


class NotANumber(ValueError):
    """What was returned instead of a finite number."""


def read_score(scored: object) -> tuple[float, dict[str, float]]:
    """(value, metrics) of a number or of (number, {metric: number}). Raises NotANumber."""
    value: object = scored
    metrics: Mapping[object, object] = {}
    pair = cast(tuple[object, ...], scored) if isinstance(scored, tuple) else ()
    if len(pair) == 2 and isinstance(pair[1], Mapping):
        value, metrics = pair[0], cast(Mapping[object, object], pair[1])
    numbers = {str(k): _finite(v, f"metric {k} ") for k, v in metrics.items()}
    return _finite(value), numbers


def _finite(value: object, where: str = "") -> float:
    if not isinstance(value, Real):
        raise NotANumber(where + ("None" if value is None else type(value).__name__))
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise NotANumber(f"{where}{number}")
    return number
