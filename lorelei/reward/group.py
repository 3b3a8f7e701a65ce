"""The rollouts of one group, for rewards that score all of them by one call, as TRL's do."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from lorelei.reward.contract import RewardResult, Sample

ScoreAll = Callable[[Sequence[Sample]], Awaitable[list[RewardResult]]]


class GroupScores:
    """Scores of one group that wait for each other.

    A call is made when every rollout that still runs waits for its score: one that failed before
    is not waited for, and one whose environment scores several turns takes part in several calls.
    """

    def __init__(self, size: int) -> None:
        self._running = size
        self._waiting: dict[int, tuple[Sample, asyncio.Future[RewardResult]]] = {}
        self._calls: set[asyncio.Task[None]] = set()
        self._score_all: ScoreAll | None = None

    @contextmanager
    def member(self, number: int) -> Generator[None]:
        """While rollout `number` runs, in its own task."""
        token = _MEMBER.set(Member(self, number))
        try:
            yield
        finally:
            _MEMBER.reset(token)
            self._running -= 1
            self._call_if_complete()

    async def score(self, number: int, sample: Sample, score_all: ScoreAll) -> RewardResult:
        """The score of a rollout's sample, by a call with those of its siblings, in their order."""
        self._score_all = score_all
        future = asyncio.get_running_loop().create_future()
        self._waiting[number] = (sample, future)
        self._call_if_complete()
        try:
            return await future
        finally:
            self._waiting.pop(number, None)

    def _call_if_complete(self) -> None:
        if self._waiting and len(self._waiting) >= self._running:
            call = asyncio.create_task(self._call())
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)

    async def _call(self) -> None:
        assert self._score_all is not None, "somebody waits"
        waiting = [self._waiting[number] for number in sorted(self._waiting)]
        self._waiting = {}
        try:
            results = await self._score_all([sample for sample, _ in waiting])
        except BaseException as error:  # such as of a pool that was closed
            for _, future in waiting:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), result in zip(waiting, results, strict=True):
            if not future.done():
                future.set_result(result)


class Member:
    """One rollout of a group."""

    def __init__(self, group: GroupScores, number: int) -> None:
        self._group, self._number = group, number

    async def score(self, sample: Sample, score_all: ScoreAll) -> RewardResult:
        """See GroupScores."""
        return await self._group.score(self._number, sample, score_all)


# Set in the task of each rollout: environments hand on texts, and need not know of groups.
_MEMBER: ContextVar[Member | None] = ContextVar("member", default=None)


def current_member() -> Member | None:
    """The rollout that this task runs, if it is one of a group."""
    return _MEMBER.get()
