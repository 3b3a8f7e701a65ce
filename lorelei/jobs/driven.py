"""A job that is fed by calls: whoever holds it decides what one adapter is trained on.

Consumes calls of `train`; produces their works one after another; waits for the next call. A call
returns when its step is done: the loop has committed it, or will with its next checkpoint.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from lorelei.jobs.job import JobFailed
from lorelei.publish.canary import Watched
from lorelei.train.checks import check_losses
from lorelei.train.work import Result, Round, Work
from lorelei.types import AdapterRef, AdapterSpec, Policy


class DrivenJob:
    """Implements Job."""

    def __init__(
        self, name: str, spec: AdapterSpec, seed: int = 0, watched: Watched | None = None
    ) -> None:
        self.name, self.spec, self.seed, self.watched = name, spec, seed, watched
        self.version = self.steps = 0
        self.ref: AdapterRef | None = None  # what can be sampled from
        # None: the job was closed while the loop waits for work
        self._calls: asyncio.Queue[tuple[Work, asyncio.Future[Result]] | None] = asyncio.Queue()
        self._running: asyncio.Future[Result] | None = None
        self._result: Result | None = None
        self._closed = False

    @property
    def done(self) -> bool:
        return self._closed

    async def train(
        self,
        rounds: Sequence[Round],
        policies: Mapping[str, Policy] | None = None,
        publish: bool = False,
    ) -> Result:
        """Train on these rounds. A round whose step is None adds to the gradients of the next one.

        Raises ValueError for rounds that cannot be trained on, JobFailed once it is closed.
        """
        if self._closed:
            raise JobFailed(f"adapter {self.name!r}: its job is closed")
        for one in rounds:
            if one.batch.adapters != (self.name,):
                raise ValueError(f"batch: it is of {one.batch.adapters}, not of {self.name!r}")
        work = Work(
            adapter=self.name, rounds=tuple(rounds), policies=policies or {}, publish=publish
        )
        for one in rounds:
            check_losses(one.batch, {self.name: one.loss})
        if publish and not work.steps:
            raise ValueError("publish: there is no optimizer step after which to publish")
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._calls.put_nowait((work, future))
        return await future

    async def begin(self, ref: AdapterRef) -> None:
        """Nothing is evaluated."""

    async def work(self) -> Work:
        while (call := await self._calls.get()) is not None:
            work, future = call
            if not future.done():  # the caller may have gone
                self._running = future
                return work
        raise asyncio.CancelledError

    async def tell(self, result: Result, ref: AdapterRef | None) -> Mapping[str, Any]:
        self._result = result
        self.steps += result.work.steps
        if ref is not None:
            self.version = ref.version
        metrics: dict[str, Any] = {"step": self.steps}
        for one in result.rounds:
            metrics |= one.metrics
            if one.step is not None:
                metrics |= {"grad_norm": one.step.grad_norm, "optimizer_step": one.step.step}
        return {**metrics, "train_seconds": result.seconds}

    async def admit(self, ref: AdapterRef | None) -> None:
        self.ref = ref or self.ref
        if self._running is not None and not self._running.done():
            assert self._result is not None, "told before"
            self._running.set_result(self._result)
        self._running = self._result = None

    def saved(self) -> None:
        """Callers hear of their own steps."""

    def state(self) -> Mapping[str, Any]:
        return {"steps": self.steps}

    def restore(self, version: int, state: Mapping[str, Any]) -> None:
        self.version, self.steps = version, state["steps"]

    async def close(self) -> None:
        """Calls that wait, and later ones, raise JobFailed. Idempotent."""
        self._closed = True
        waiting = [self._running] if self._running is not None else []
        while not self._calls.empty():
            if (call := self._calls.get_nowait()) is not None:
                waiting.append(call[1])
        self._calls.put_nowait(None)
        for future in waiting:
            if not future.done():
                future.set_exception(JobFailed(f"adapter {self.name!r}: its job was closed"))
