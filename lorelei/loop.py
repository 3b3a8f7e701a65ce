"""The one loop: a scheduler over a live registry of jobs.

    ready works -> one mixed pass -> stage -> publish -> canary -> tell -> commit -> admit

Consumes the works that the registry's jobs have ready; produces committed steps; waits for the
first work. It knows no task and no score: jobs do. One adapter is the case N = 1, and synchronous
training is the case in which a job has no work before its new version is admitted.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from lorelei.jobs.job import Job
from lorelei.jobs.registry import Registry
from lorelei.lora.state import AdapterSnapshot, AdapterState
from lorelei.obs.console import Console
from lorelei.publish.canary import Canary, Watched
from lorelei.publish.publisher import VersionPublisher
from lorelei.store.manifest import AdapterEntry, AdapterRecord, Manifest
from lorelei.store.run import RunStore
from lorelei.train.contract import TrainEngine
from lorelei.train.engine_thread import EngineThread
from lorelei.train.step import run_works
from lorelei.train.work import Result, Work
from lorelei.types import AdapterRef


@dataclass(slots=True, kw_only=True, eq=False)
class Loop:
    """What the loop drives, and the little it remembers."""

    registry: Registry
    thread: EngineThread
    publisher: VersionPublisher
    canary: Canary | None  # None: it was turned off
    store: RunStore
    console: Console
    checkpoint_every: int
    gauges: Callable[[float], Mapping[str, float]]  # more of a step's record, by its seconds
    step: int = 0  # commits and steps so far, whichever adapters they touched
    refs: dict[str, AdapterRef] = field(default_factory=dict[str, AdapterRef])  # that are served
    unsaved: set[str] = field(default_factory=set[str])  # adapters that moved since the manifest
    # adapters of the manifest that no job trains now
    resting: dict[str, AdapterRecord] = field(default_factory=dict[str, AdapterRecord])
    retiring: set[asyncio.Task[None]] = field(default_factory=set[asyncio.Task[None]])
    between_steps: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def engine(self) -> TrainEngine:
        return self.thread.engine

    def watched(self, names: Sequence[str]) -> dict[str, Watched]:
        """What the canary knows of those adapters that it watches."""
        found = {name: self.registry[name].watched for name in names}
        return {name: one for name, one in found.items() if one is not None}


async def run(loop: Loop) -> None:
    """Train until no job has work, or the registry was stopped.

    A step is committed or it did not happen: a crash before the commit redoes it. Raises what a
    failed job raised, after the others have ended.
    """
    clock = _Clock()
    async with aclosing(loop.registry.ready()) as ready:
        async for works in ready:
            clock.lap("wait")
            async with loop.between_steps:
                await _step(loop, works, clock)
    async with loop.between_steps:
        if loop.unsaved:  # stopped between two checkpoints
            await _save(loop)
    for job in loop.registry:  # what still runs would keep versions from retiring
        await job.close()
    await asyncio.gather(*loop.retiring)
    for error in loop.registry.failed.values():
        raise error


async def begin(loop: Loop) -> None:
    """Publish the versions that a run starts or resumes on, and let its jobs begin.

    The jobs of a new run evaluate them, and step 0 is committed, so that a crash at any time can
    be resumed. Raises CanaryFailed when the inference engine serves something else.
    """
    names = [job.name for job in loop.registry]
    await _introduce(loop, names)
    if loop.store.latest is None:
        for name in names:
            await loop.registry[name].begin(loop.refs[name])
        loop.unsaved |= set(names)
        await _save(loop)
    for name in names:
        await loop.registry[name].admit(loop.refs[name])


async def add(loop: Loop, job: Job, start: AdapterSnapshot | None = None) -> None:
    """Train one more adapter from now on, fresh or from a snapshot. It is committed on return.

    An adapter that rests in the run goes on where it stood. Raises ValueError for a name that is
    taken or a shape that does not fit, and CanaryFailed; then nothing has changed.
    """
    async with loop.between_steps:
        engine, call = loop.engine, loop.thread.call
        # an adapter of this name that was just removed may have had the very same version
        await asyncio.gather(*(t for t in loop.retiring if t.get_name() == job.name))
        rested = loop.resting.get(job.name)
        if start is None and rested is not None:
            start = await asyncio.to_thread(loop.store.load, job.name)
            job.restore(rested.version, rested.state)
        loop.registry.add(job)
        loop.registry.pause(job.name)
        try:
            await call(engine.add_adapter, job.name, job.spec, job.seed)
            try:
                if start is not None:
                    await call(engine.restore, job.name, start)
                await _introduce(loop, [job.name])
                if rested is None:
                    await job.begin(loop.refs[job.name])
            except BaseException:
                await call(engine.drop_adapter, job.name)
                raise
        except BaseException:
            loop.registry.remove(job.name)
            if (ref := loop.refs.pop(job.name, None)) is not None:
                _retire(loop, ref)
            raise
        loop.resting.pop(job.name, None)
        loop.unsaved.add(job.name)
        loop.step += 1
        await _save(loop)
        await job.admit(loop.refs[job.name])
        loop.registry.resume(job.name)


async def remove(loop: Loop, name: str) -> None:
    """Train an adapter no more and forget it, now; earlier checkpoints still have it.

    Raises KeyError naming the adapters there are.
    """
    async with loop.between_steps:
        job = loop.registry.remove(name)
        await job.close()
        await loop.thread.call(loop.engine.drop_adapter, name)
        _retire(loop, loop.refs.pop(name))
        loop.unsaved.discard(name)
        loop.step += 1
        await _save(loop)


async def _step(loop: Loop, works: Sequence[Work], clock: _Clock) -> None:
    # a job may have been removed while the loop was between two steps
    works = [work for work in works if loop.registry.claim(work)]
    if not works:
        return
    results = await _train(loop, works)
    clock.lap("train")
    if not results:
        return
    moved = {r.adapter: r for r in results if r.work.steps}
    loop.step += bool(moved)
    loop.unsaved |= moved.keys()
    published = {name: _next_version(loop, r) for name, r in moved.items() if r.work.publish}
    due = _checkpoint_due(loop, works) if moved else False
    states, snapshots = await _leave(loop, moved, published, due)
    pending = await _stage(loop, snapshots, published) if due else None  # durable, not yet true
    clock.lap("checkpoint")
    refs = await loop.publisher.publish(published, states)
    clock.lap("publish")
    served = await loop.canary.check(refs, loop.watched(list(refs))) if loop.canary else {}
    clock.lap("canary")
    metrics = {r.adapter: await _tell(loop, r, refs, served) for r in results}
    clock.lap("eval")
    records = _log_step(loop, metrics, clock.reset())
    if pending is not None:
        await _commit(loop, pending, refs)  # the commit makes the step true
    clock.lap("checkpoint")
    for record in records:  # nobody is shown a step that may not have happened
        loop.console.step(record)
    replaced = [loop.refs[name] for name in refs if name in loop.refs]
    loop.refs |= refs
    for result in results:  # opens room: what they sample next is of the new versions
        await loop.registry[result.adapter].admit(refs.get(result.adapter))
    for ref in replaced:
        _retire(loop, ref)


async def _train(loop: Loop, works: Sequence[Work]) -> list[Result]:
    """What came of the works, without those that failed: their jobs stop, the others go on."""
    results = await loop.thread.call(run_works, loop.engine, works)
    for result in results:
        if result.error is not None:
            loop.registry.fail(result.adapter, result.error)
            await loop.registry[result.adapter].close()
    return [result for result in results if result.error is None]


def _next_version(loop: Loop, result: Result) -> int:
    return loop.registry[result.adapter].version + 1


def _checkpoint_due(loop: Loop, works: Sequence[Work]) -> bool:
    last = {work.adapter for work in works if work.last}
    ends = all(job.done or job.name in last for job in loop.registry)
    return ends or loop.step % loop.checkpoint_every == 0


async def _leave(
    loop: Loop, moved: Mapping[str, Result], published: Mapping[str, int], due: bool
) -> tuple[dict[str, AdapterState], dict[str, AdapterSnapshot]]:
    """(states to publish, snapshots to stage): each adapter leaves the engine once."""
    engine, call = loop.engine, loop.thread.call
    names = sorted(loop.unsaved) if due else []
    snapshots = {name: await call(engine.snapshot, name) for name in names}
    states = {
        name: snapshots[name].state if due else await call(engine.adapter_state, name)
        for name in published
    }
    return states, snapshots


async def _introduce(loop: Loop, names: Sequence[str]) -> None:
    """Prove that adapters are served as themselves, and publish the versions they stand at."""
    watched = loop.watched(names)
    if loop.canary:
        for record in await loop.canary.prove(watched):
            loop.store.append_metrics(record)
    versions = {name: loop.registry[name].version for name in names}
    states = {name: await loop.thread.call(loop.engine.adapter_state, name) for name in names}
    refs = await loop.publisher.publish(versions, states)
    if loop.canary:
        await loop.canary.check(refs, watched)
    loop.refs |= refs


async def _tell(
    loop: Loop,
    result: Result,
    refs: Mapping[str, AdapterRef],
    served: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    name = result.adapter
    metrics = await loop.registry[name].tell(result, refs.get(name))
    return {**metrics, **served.get(name, {})}


async def _save(loop: Loop) -> None:
    """A checkpoint of all that moved since the last one."""
    names = sorted(loop.unsaved)
    snapshots = {name: await loop.thread.call(loop.engine.snapshot, name) for name in names}
    refs = {name: ref for name, ref in loop.refs.items() if name in loop.registry}
    await _commit(loop, await _stage(loop, snapshots, {}), refs)


async def _stage(
    loop: Loop, snapshots: Mapping[str, AdapterSnapshot], published: Mapping[str, int]
) -> Manifest:
    manifest = loop.store.latest
    latest: Mapping[str, AdapterEntry] = manifest.adapters if manifest else {}
    records = {
        job.name: AdapterRecord(
            version=published.get(job.name, job.version),
            optimizer_step=snapshots[job.name].step
            if job.name in snapshots
            else latest[job.name].record.optimizer_step,
            state=job.state(),
        )
        for job in loop.registry
    }
    records |= loop.resting
    return await asyncio.to_thread(loop.store.stage, loop.step, snapshots, records, {})


async def _commit(loop: Loop, draft: Manifest, refs: Mapping[str, AdapterRef]) -> None:
    older = {n: ref for n, ref in loop.refs.items() if n in loop.registry}
    # what the jobs were told came after the staging
    states = {job.name: job.state() for job in loop.registry}
    state = {"finished": loop.registry.finished}
    await asyncio.to_thread(loop.store.commit, draft, {**older, **refs}, states, state)
    loop.unsaved.clear()
    for job in loop.registry:
        job.saved()


def _retire(loop: Loop, ref: AdapterRef) -> None:
    """Forget a replaced version when what is in flight has drained; nobody waits for it."""
    task = asyncio.create_task(loop.publisher.retire(ref), name=ref.name)
    loop.retiring.add(task)
    task.add_done_callback(loop.retiring.discard)


def _log_step(
    loop: Loop, metrics: Mapping[str, Mapping[str, Any]], seconds: Mapping[str, float]
) -> list[dict[str, Any]]:
    """The record of each adapter's step, which the next commit keeps."""
    shared = {
        "trainer_idle": seconds["wait"] / seconds["step"],
        **loop.gauges(seconds["step"]),
        **loop.publisher.metrics,
        "seconds": dict(seconds),
    }
    records: list[dict[str, Any]] = []
    for name, own in metrics.items():
        version = loop.registry[name].version
        who = {"kind": "step", "adapter": name, "version": version, "time": time.time()}
        records.append({**who, **own, **shared})
        loop.store.append_metrics(records[-1])
    return records


class _Clock:
    """Seconds of the phases of a step."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self._laps[phase] = self._laps.get(phase, 0.0) + now - self._last
        self._last = now

    def reset(self) -> dict[str, float]:
        """The phases so far and their sum as 'step'; the next step starts now."""
        now = time.perf_counter()
        laps = {"wait": 0.0, **self._laps, "step": now - self._start}
        self._start, self._laps = now, {}
        return laps
