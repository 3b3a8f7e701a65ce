"""The thread that owns the train engine: every call of the engine goes through it.

Consumes calls from anywhere on the event loop, one at a time, in the order in which they come;
produces what they return; waits for nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from lorelei.model.kernels.build import rest
from lorelei.train.contract import TrainEngine

T = TypeVar("T")


class EngineThread:
    """One train engine and its thread, always the same, so that the event loop stays free."""

    def __init__(self, engine: TrainEngine) -> None:
        self.engine = engine
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="train")

    async def call(self, function: Callable[..., T], *args: object) -> T:
        """Run a function that calls the engine, or one of its methods."""
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, _then_rest, function, args
        )

    def close(self) -> None:
        """Wait for the running call and close the engine."""
        self._thread.shutdown()
        self.engine.close()


def _then_rest(function: Callable[..., T], args: tuple[object, ...]) -> T:
    try:
        return function(*args)
    finally:
        rest()  # OpenMP's threads would spin on the cores that the decode thread needs
