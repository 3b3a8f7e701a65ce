"""Keeps rollouts running for every adapter and gives complete batches.

Each adapter has its own data order, admission and batch; none waits for another. A failed rollout
is data with a reason: its siblings live on, and a group of which too little is left gives its
room back.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field

from lorelei.config.experiment import Experiment
from lorelei.data.contract import PromptSource
from lorelei.env.contract import Env
from lorelei.inference.contract import EngineClosed, InferenceEngine
from lorelei.rollout.admission import Admission
from lorelei.rollout.meter import Meter
from lorelei.rollout.sampler import EngineSampler, Policy
from lorelei.store.spool import Spool
from lorelei.types import AdapterRef, Group, Prompt, Rollout

MAX_CONSECUTIVE_FAILED_GROUPS = (
    64  # groups that failed in a row before the run stops with the last reason
)


class RolloutsFail(ValueError):
    """Group after group fails: something is wrong with the task, the reward or the model."""


@dataclass(slots=True, kw_only=True)
class Lane:
    """One adapter's way through the collector."""

    experiment: Experiment
    source: PromptSource
    env: Env
    policy: Policy
    admission: Admission
    next_index: int
    redo: list[int] = field(default_factory=list[int])  # started before a crash, not finished
    running: set[int] = field(default_factory=set[int])
    finished: list[Group] = field(default_factory=list[Group])
    failed_in_a_row: int = 0
    errors: Counter[str] = field(default_factory=Counter[str])

    @property
    def done(self) -> bool:
        return self.admission.version >= self.experiment.steps

    @property
    def ready(self) -> bool:
        return not self.done and len(self.finished) >= self.experiment.algo.batch_size

    @property
    def oldest(self) -> int:
        """The oldest version whose rollouts may be trained on now."""
        return self.admission.version - self.experiment.rollout.max_head_offpolicyness

    def room(self) -> int:
        """How many more groups may start: what admission allows and the steps left can use."""
        total = self.experiment.steps * self.experiment.algo.batch_size
        unstarted = total - self.admission.accepted - self.admission.running
        return min(self.admission.capacity(), unstarted)

    def pending(self) -> list[int]:
        """Indices below `next_index` that were not trained on: what a resumed run still owes."""
        return sorted({*self.redo, *self.running, *(group.index for group in self.finished)})

    def start(self) -> int:
        """Take the next index and count it as running."""
        index = self.redo.pop(0) if self.redo else self.next_index
        self.next_index = max(self.next_index, index + 1)
        self.running.add(index)
        self.admission.start()
        return index


class Collector:
    """Starts groups where admission has room; see `batches`."""

    def __init__(
        self,
        lanes: Iterable[Lane],
        engine: InferenceEngine,
        spool: Spool,
        meter: Meter | None = None,
    ) -> None:
        self.lanes = {lane.experiment.name: lane for lane in lanes}
        self.meter = meter or Meter()
        self._engine, self._spool = engine, spool
        self._stopping = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._failure: BaseException | None = None

    async def batches(self) -> AsyncIterator[dict[str, list[Group]]]:
        """Complete batches by adapter until every adapter has its steps.

        Whatever is complete comes together; the other adapters go on collecting. Between two
        batches the caller trains, publishes and calls `admit`.
        """
        while not self._stopping and not all(lane.done for lane in self.lanes.values()):
            self._start_groups()
            while not any(lane.ready for lane in self.lanes.values()):
                await self._wait()
                if self._stopping:
                    return
            yield {name: self._take(lane) for name, lane in self.lanes.items() if lane.ready}

    def admit(self, refs: Mapping[str, AdapterRef]) -> list[AdapterRef]:
        """New rollouts use these versions from now on. Returns the versions they replace."""
        replaced: list[AdapterRef] = []
        for name, ref in refs.items():
            lane = self.lanes[name]
            if lane.policy.ref is not None:
                replaced.append(lane.policy.ref)
            lane.policy.ref = ref
            lane.admission.version = ref.version
            self._drop_stale(lane)
        return replaced

    async def interrupt(self, replaced: Iterable[AdapterRef]) -> None:
        """Move what is sampled from replaced versions to the newest ones, where a run asks for it.

        Requests go on behind the tokens they have, see rollout.sampler.
        """
        for ref in replaced:
            if self.lanes[ref.name].policy.interruptible:
                await self._engine.abort(ref)

    def stop(self) -> None:
        """Let `batches` end instead of giving another batch."""
        self._stopping = True
        self._changed.set()

    async def close(self) -> None:
        """Stop all running groups; what is finished stays in `finished`. Idempotent."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _wait(self) -> None:
        await self._changed.wait()
        self._changed.clear()
        if self._failure is not None:
            raise self._failure

    def _take(self, lane: Lane) -> list[Group]:
        size = lane.experiment.algo.batch_size
        # in the order they were started: the oldest would be the first to grow stale
        lane.finished.sort(key=lambda group: group.index)
        taken, lane.finished = lane.finished[:size], lane.finished[size:]
        return taken

    def _drop_stale(self, lane: Lane) -> None:
        fresh = [group for group in lane.finished if group.min_version >= lane.oldest]
        stale = [group.index for group in lane.finished if group.min_version < lane.oldest]
        for _ in stale:
            lane.admission.forget()
            lane.errors["stale"] += 1
        self._spool.remove(lane.experiment.name, stale)
        lane.finished = fresh

    def _start_groups(self) -> None:
        for lane in self.lanes.values():
            while lane.room() > 0:
                task = asyncio.create_task(self._group(lane, lane.start()))
                self._tasks.add(task)
                task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._failure = task.exception()
        if not self._stopping and self._failure is None:
            self._start_groups()  # also while the caller trains: the others go on collecting
        self._changed.set()

    async def _group(self, lane: Lane, index: int) -> None:
        prompt = lane.source.prompt(index)
        samples = range(lane.experiment.rollout.n_samples)
        rollouts = await asyncio.gather(*(self._rollout(lane, prompt, index, n) for n in samples))
        group = Group(
            adapter=lane.experiment.name, index=index, prompt=prompt, rollouts=tuple(rollouts)
        )
        lane.errors.update(r.error.split(":")[0] for r in rollouts if r.error is not None)
        if reason := unfit(group, lane.experiment.algo.drop_zero_variance_groups):
            lane.running.discard(index)
            lane.admission.give_back()
            lane.failed_in_a_row += 1
            if lane.failed_in_a_row >= MAX_CONSECUTIVE_FAILED_GROUPS:
                raise RolloutsFail(
                    f"adapter {group.adapter}: {MAX_CONSECUTIVE_FAILED_GROUPS} groups in a row "
                    f"gave nothing to train on; the last one: {reason}"
                )
            return
        if lane.experiment.rollout.max_head_offpolicyness:
            await asyncio.to_thread(self._spool.put, group)
        lane.failed_in_a_row = 0
        lane.running.discard(index)
        lane.admission.accept()
        lane.finished.append(group)
        self._drop_stale(lane)  # training may have gone on without it

    async def _rollout(self, lane: Lane, prompt: Prompt, index: int, number: int) -> Rollout:
        sampler = EngineSampler(self._engine, lane.policy, f"{index}/{number}", self.meter)
        start = time.perf_counter()
        try:
            episode = await lane.env.run(prompt, sampler)
        except EngineClosed:
            raise
        except Exception as error:  # the border to environments: any failure is one rollout's
            return Rollout(
                adapter=lane.experiment.name,
                sample=number,
                turns=(),
                reward=None,
                error=f"environment raised {type(error).__name__}: {error}",
                seconds=time.perf_counter() - start,
            )
        return Rollout(
            adapter=lane.experiment.name,
            sample=number,
            turns=episode.turns,
            reward=episode.reward,
            error=episode.error,
            metrics=episode.metrics,
            seconds=time.perf_counter() - start,
        )


def unfit(group: Group, drop_flat: bool) -> str | None:
    """Why a group cannot be trained on, or None."""
    rewards = [r.reward for r in group.rollouts if r.trainable and r.reward is not None]
    if len(rewards) < 2:
        errors = sorted({r.error for r in group.rollouts if r.error is not None})
        return f"{len(rewards)} of {len(group.rollouts)} rollouts have a reward: {errors[:1]}"
    if drop_flat and min(rewards) == max(rewards):
        return f"all rewards are {rewards[0]}"
    return None
