"""A user's function called under a deadline, and the episode that its result makes."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

from lorelei.data.reply import Reply
from lorelei.env.contract import Episode
from lorelei.reward.contract import Reward, RewardResult, read_score
from lorelei.types import Prompt, Turn


async def call_within(seconds: float, function: Callable[..., Any], /, **values: Any) -> Any:
    """What the function returns. One that is not async runs in a thread.

    Raises TimeoutError after the deadline, and what the function raises. A thread cannot be
    killed: after its deadline it runs on, and its result is dropped.
    """
    deadline = asyncio.timeout(seconds)
    try:
        async with deadline:
            if inspect.iscoroutinefunction(function):
                return await function(**values)
            return await asyncio.to_thread(function, **values)
    except TimeoutError as error:
        if not deadline.expired():  # the function's own
            raise
        name = getattr(function, "__name__", "the function")
        raise TimeoutError(f"{name} took longer than {seconds:g} s (env.timeout)") from error


def given(turns: tuple[Turn, ...], score: object) -> Episode:
    """An episode with a number or (number, {metric: number}). Raises ValueError for neither."""
    value, metrics = read_score(score)
    return Episode(turns=turns, reward=value, metrics={**metrics, "turns": float(len(turns))})


async def score(reward: Reward, prompt: Prompt, reply: Reply) -> RewardResult:
    """A reply's score. The reward is given the whole text and, as columns, its parts."""
    return await reward.score({**prompt.data, **reply.columns()}, reply.text)


async def scored(turns: tuple[Turn, ...], prompt: Prompt, reward: Reward, reply: Reply) -> Episode:
    """An episode whose reply the run's reward scores."""
    result = await score(reward, prompt, reply)
    return Episode(
        turns=turns,
        reward=result.value,
        error=result.error,
        metrics={**result.metrics, "turns": float(len(turns))},
    )
