"""The jobs of a run, live: they are added, paused, resumed and removed while others train.

Consumes works of jobs; produces, as soon as there is any, all works that are ready; waits for the
first of them. A job whose work raises a ValueError is put aside, the others go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping

from lorelei.jobs.job import Job
from lorelei.train.work import Work


class Registry:
    """Jobs by adapter name; see `ready`."""

    def __init__(
        self,
        jobs: Iterable[Job] = (),
        warn: Callable[[str], None] = print,
        stays_open: bool = False,
    ) -> None:
        """warn: called with one line when a job fails. stays_open: more jobs may always come."""
        self._jobs = {job.name: job for job in jobs}
        self._warn, self._stays_open = warn, stays_open
        self._asked: dict[str, asyncio.Task[Work]] = {}
        self._given: dict[str, Work] = {}  # and not yet claimed
        self._paused: set[str] = set()
        self._failed: dict[str, ValueError] = {}
        self._stopping = False
        self._changed = asyncio.Event()

    def __iter__(self) -> Iterator[Job]:
        return iter(tuple(self._jobs.values()))  # jobs may come and go while a caller awaits

    def __contains__(self, name: str) -> bool:
        return name in self._jobs

    def __getitem__(self, name: str) -> Job:
        """Raises KeyError naming the adapters there are."""
        if name not in self._jobs:
            known = ", ".join(self._jobs) or "none"
            raise KeyError(f"no job trains an adapter {name!r}; there are: {known}")
        return self._jobs[name]

    @property
    def paused(self) -> frozenset[str]:
        return frozenset(self._paused)

    @property
    def failed(self) -> Mapping[str, ValueError]:
        """Why jobs were put aside."""
        return dict(self._failed)

    @property
    def finished(self) -> bool:
        """Whether there are jobs, and every one is done."""
        return bool(self._jobs) and all(job.done for job in self)

    def add(self, job: Job) -> None:
        """From now on the job is asked for work. Raises ValueError when the name is taken."""
        if job.name in self._jobs:
            raise ValueError(f"adapter {job.name!r} has a job already; remove it first")
        self._jobs[job.name] = job
        self._changed.set()

    def pause(self, name: str) -> None:
        """Take no more work of a job until `resume`; what it has ready waits."""
        self._paused.add(self[name].name)
        self._changed.set()

    def resume(self, name: str) -> None:
        """Undo `pause`."""
        self._paused.discard(self[name].name)
        self._changed.set()

    def remove(self, name: str) -> Job:
        """Forget a job, and the work that it has ready."""
        job = self[name]
        del self._jobs[name]
        self._paused.discard(name)
        self._failed.pop(name, None)
        self._given.pop(name, None)
        if (task := self._asked.pop(name, None)) is not None:
            task.cancel()
        self._changed.set()
        return job

    def fail(self, name: str, error: ValueError) -> None:
        """Put a job aside: it is asked for no more work. Warns if others go on."""
        self._failed[name] = error
        if self._stays_open or any(map(self._alive, self)):
            self._warn(f"adapter {name} stops, the others go on: {error}")

    def claim(self, work: Work) -> bool:
        """Whether a work that was given is to be done: not when its job was removed since."""
        return self._given.pop(work.adapter, None) is work

    def stop(self) -> None:
        """Let `ready` end instead of giving works again."""
        self._stopping = True
        self._changed.set()

    async def ready(self) -> AsyncGenerator[list[Work], None]:
        """Works of distinct adapters, in the order of the jobs, until none can give any more.

        Whatever is ready comes together; the other jobs go on. Paused jobs are waited for; one
        that stays open ends with `stop` alone.
        """
        try:
            while not self._stopping and (self._stays_open or any(map(self._alive, self))):
                self._ask()
                works = self._take()
                if works:
                    yield works
                else:
                    await self._wait()
        finally:
            for task in self._asked.values():
                task.cancel()
            await asyncio.gather(*self._asked.values(), return_exceptions=True)
            self._asked.clear()

    def _alive(self, job: Job) -> bool:
        return not job.done and job.name not in self._failed

    def _ask(self) -> None:
        for job in self:
            if self._alive(job) and job.name not in self._paused and job.name not in self._asked:
                self._asked[job.name] = asyncio.create_task(job.work())

    def _take(self) -> list[Work]:
        ready = [
            name
            for name in self._jobs
            if name in self._asked and self._asked[name].done() and name not in self._paused
        ]
        works: list[Work] = []
        for name in ready:
            task = self._asked.pop(name)
            self._changed.set()  # it may have been the last that could give any
            if task.cancelled():  # its job was closed
                continue
            try:
                works.append(task.result())
                self._given[name] = works[-1]
            except ValueError as error:
                self.fail(name, error)
        return works

    async def _wait(self) -> None:
        changed = asyncio.create_task(self._changed.wait())
        asked = [task for name, task in self._asked.items() if name not in self._paused]
        try:
            await asyncio.wait([changed, *asked], return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()
            self._changed.clear()  # not before: a change while works were away counts
