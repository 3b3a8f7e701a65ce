"""What a scorer is and what a reward is. Neither this file nor a scorer imports torch."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

MOST_METRICS = 100  # of one sample; each is a column of metrics.jsonl


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardResult:
    """A finite value, or None and the reason; neither where nothing is scored.

    `error` starts with one of a few fixed kinds, up to the first colon: 'timeout', 'crashed',
    'not started', 'not sent', 'raised <Exception>', 'not a number'.
    """

    value: float | None
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    error: str | None = None


class Reward(Protocol):
    """Turns a completion into a reward; RewardPool is one."""

    async def score(self, prompt_data: Mapping[str, Any], completion_text: str) -> RewardResult:
        """Never raises for what the reward does."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A completion to be scored. `data` is Prompt.data."""

    data: Mapping[str, Any]
    completion: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorer:
    """What a reward worker calls.

    call: one score for each sample, or an awaitable of them; a score is a number, or (number,
    {metric: number}). What it returns or raises is checked by the worker.
    """

    call: Callable[[Sequence[Sample]], object]
    whole_group: bool = False  # the samples of one prompt are scored by one call


class NoReward:
    """The Reward of a run whose environment gives the reward itself."""

    async def score(self, prompt_data: object, completion_text: str) -> RewardResult:
        """See Reward: no value, with the reason."""
        return RewardResult(
            value=None, error="no reward: the environment gave none, and reward.kind is env"
        )


class Unscored:
    """The Reward of an adapter that learns without one."""

    async def score(self, prompt_data: object, completion_text: str) -> RewardResult:
        """See Reward: neither a value nor an error."""
        return RewardResult(value=None)


class NotANumber(ValueError):
    """What was returned instead of a finite number."""


def read_score(scored: object) -> tuple[float, dict[str, float]]:
    """(value, metrics) of a number or of (number, {metric: number}). Raises NotANumber.

    A number is what float() takes, text excepted: also NumPy's and torch's, arrays of one element.
    """
    value: object = scored
    metrics: Mapping[object, object] = {}
    pair = cast(tuple[object, ...], scored) if isinstance(scored, tuple) else ()
    if len(pair) == 2 and isinstance(pair[1], Mapping):
        value, metrics = pair[0], cast(Mapping[object, object], pair[1])
    if len(metrics) > MOST_METRICS:
        raise NotANumber(f"{len(metrics)} metrics, at most {MOST_METRICS} are kept")
    numbers = {str(k)[:100]: as_float32(v, f"metric {k} ") for k, v in metrics.items()}
    return as_float32(value), numbers


def as_float32(value: object, where: str = "") -> float:
    """A number that float32 can hold; rewards are trained on as float32. Raises NotANumber."""
    if value is None or isinstance(value, str | bytes | bytearray):
        raise NotANumber(where + ("None" if value is None else type(value).__name__))
    item = getattr(value, "item", None)  # of arrays and tensors of one element, on any device
    try:
        plain: Any = item() if callable(item) else value
        if isinstance(plain, str | bytes):
            raise TypeError("text")
        number = float(plain)
    except OverflowError:  # of an integer
        number = math.inf
    except Exception as error:  # the border to the user's types
        raise NotANumber(where + type(value).__name__) from error
    if not math.isfinite(number):
        raise NotANumber(f"{where}{number}")
    try:
        struct.pack("<f", number)
    except OverflowError as error:
        raise NotANumber(f"{where}{number} is outside of the range of float32") from error
    return number
