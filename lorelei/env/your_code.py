"""Calling a user's function: one that is async or one that is not, under a deadline."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any


async def call_within(seconds: float, function: Callable[..., Any], /, **values: Any) -> Any:
    """What the function returns. One that is not async runs in a thread.

    Raises TimeoutError after the deadline (a thread cannot be killed: it runs on, unheard), and
    what the function raises.
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
