"""Requests that keep a rollout engine busy, and its tokens as time goes by."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise

import numpy as np

from lorelei.inference.contract import InferenceEngine
from lorelei.types import AdapterRef, GenerateRequest, SamplingParams

LANES, PROMPT_TOKENS = 8, 24

Window = tuple[float, float]  # seconds, of perf_counter


class Traffic:
    """LANES requests at a time, each of the newest version when it starts."""

    def __init__(self, engine: InferenceEngine, ref: AdapterRef, answer: int) -> None:
        """answer: tokens of each, give or take a third, so that they do not end together."""
        self.ref, self._answer = ref, answer
        self.finished = self.aborted = self.running = 0
        self.admits = asyncio.Event()  # else requests wait until they are admitted
        self.admits.set()
        self._engine = engine
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Traffic:
        self._tasks = [asyncio.create_task(self._lane(number)) for number in range(LANES)]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with suppress(asyncio.CancelledError):
                await task

    def check(self) -> None:
        """Raises what ended a lane."""
        for task in self._tasks:
            if task.done():
                task.result()

    async def _lane(self, number: int) -> None:
        random = np.random.default_rng(number)
        spread = self._answer // 3
        while True:
            await self.admits.wait()
            length = int(random.integers(self._answer - spread, self._answer + spread + 1))
            sampling = SamplingParams(max_new_tokens=length)
            tokens = random.integers(5, 290, PROMPT_TOKENS).astype(np.int32)
            key = f"{number}/{self.finished}"
            request = GenerateRequest(tokens=tokens, adapter=self.ref, sampling=sampling, key=key)
            self.running += 1
            answer = await self._engine.generate(request)
            self.running -= 1
            self.finished += 1
            self.aborted += answer.finish_reason == "abort"


class TokenClock:
    """Reads an engine's token counter again and again."""

    def __init__(self, engine: InferenceEngine, pause: float) -> None:
        """pause: seconds between two readings."""
        self.times: list[float] = []
        self.counts: list[int] = []
        self._engine, self._pause = engine, pause

    async def __aenter__(self) -> TokenClock:
        self._task = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def _read(self) -> None:
        while True:
            count = (await self._engine.health()).tokens_generated
            self.times.append(time.perf_counter())
            self.counts.append(count)
            await asyncio.sleep(self._pause)


def rate(times: Sequence[float], counts: Sequence[int], windows: Sequence[Window]) -> float:
    """Tokens a second within the windows."""
    tokens = sum(
        np.interp(end, times, counts) - np.interp(start, times, counts) for start, end in windows
    )
    return float(tokens / sum(end - start for start, end in windows))


def gaps(times: Sequence[float], counts: Sequence[int]) -> list[Window]:
    """The spans between two readings that found new tokens."""
    steps = zip(times[1:], pairwise(counts), strict=True)
    return list(pairwise(at for at, (before, now) in steps if now > before))


def meets(gap: Window, window: Window) -> bool:
    """Whether they have a moment in common."""
    return gap[0] < window[1] and gap[1] > window[0]
