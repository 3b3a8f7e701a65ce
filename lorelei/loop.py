"""The one loop. Synchronous training is staleness 0; one adapter is the case N = 1."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lorelei.lora.state import AdapterState
from lorelei.obs.console import Console
from lorelei.publish.canary import Canary
from lorelei.publish.contract import Publisher
from lorelei.rollout.collector import Collector, Lane, RolloutsFail
from lorelei.rollout.evaluate import Evaluator
from lorelei.store.manifest import AdapterRecord
from lorelei.store.run import Pending, RunStore
from lorelei.store.spool import Spool
from lorelei.train.step import Trainer
from lorelei.types import AdapterRef, Group


@dataclass(slots=True, kw_only=True)
class Loop:
    """What the loop drives, and the little it remembers."""

    collector: Collector
    trainer: Trainer
    publisher: Publisher
    canary: Canary | None  # none: it was turned off
    store: RunStore
    spool: Spool
    console: Console
    evaluators: Mapping[str, Evaluator]
    checkpoint_every: int
    step: int = 0  # steps finished, whichever adapters they touched
    scores: dict[str, float] = field(default_factory=dict[str, float])  # last held-out, by adapter
    reward: float | None = None  # of the last batch
    unsaved: set[str] = field(default_factory=set[str])  # adapters that moved since the manifest
    consumed: list[Group] = field(default_factory=list[Group])  # groups trained on since then
    retiring: set[asyncio.Task[None]] = field(default_factory=set[asyncio.Task[None]])

    @property
    def lanes(self) -> Mapping[str, Lane]:
        return self.collector.lanes

    @property
    def versions(self) -> dict[str, int]:
        """The adapter versions that new rollouts start on."""
        return {name: lane.admission.version for name, lane in self.lanes.items()}


async def run(loop: Loop) -> None:
    """Train until every adapter has its steps, or the collector was stopped.

    A step is committed or it did not happen: a crash before the commit redoes it.
    """
    clock = _Clock()
    async for batch in loop.collector.batches():
        clock.lap("rollout")
        stats = await loop.trainer.step(batch, loop.versions)
        clock.lap("train")
        loop.step += 1
        versions = loop.versions | {name: loop.versions[name] + 1 for name in stats.touched}
        loop.unsaved |= set(stats.touched)
        loop.reward = sum(m["reward"] for m in stats.metrics.values()) / len(stats.metrics)
        loop.consumed += [group for groups in batch.values() for group in groups]
        pending = await _stage(loop, versions)  # files durable, not yet true
        clock.lap("checkpoint")
        touched = {name: versions[name] for name in stats.touched}
        refs = await loop.publisher.publish(touched, await _states(loop, touched))
        clock.lap("publish")
        served = await loop.canary.check(refs) if loop.canary else {}
        clock.lap("canary")
        _log_rollouts(loop, batch, versions)
        await evaluate(loop, {n: r for n, r in refs.items() if _evaluation_due(loop, n, r)})
        clock.lap("eval")
        metrics = {name: {**stats.metrics[name], **served.get(name, {})} for name in batch}
        _log_step(loop, batch, metrics, versions, clock.reset())
        await _commit(loop, pending, refs)  # the commit makes the step true
        clock.lap("checkpoint")
        replaced = loop.collector.admit(refs)  # opens room: new rollouts start on them
        await loop.collector.interrupt(replaced)
        _retire(loop, replaced)
    if loop.unsaved:  # stopped between two checkpoints
        pending = await _stage(loop, loop.versions, now=True)
        await _commit(loop, pending, {})
    await loop.collector.close()  # what is still sampled would keep versions from retiring
    await asyncio.gather(*loop.retiring)


async def begin(loop: Loop) -> None:
    """Publish the versions a run starts or resumes on, and open the door for rollouts.

    A new run evaluates them and commits step 0, so that a crash at any time can be resumed.
    Raises CanaryFailed when the rollout engine serves something else.
    """
    if loop.canary:
        for record in await loop.canary.prove():
            loop.store.append_metrics(record)
    refs = await loop.publisher.publish(loop.versions, await _states(loop, loop.versions))
    if loop.canary:
        await loop.canary.check(refs)
    if loop.store.latest is None:
        await evaluate(loop, {name: refs[name] for name in loop.evaluators})
        loop.unsaved |= set(loop.lanes)
        pending = await _stage(loop, loop.versions, now=True)
        await _commit(loop, pending, refs)
    loop.collector.admit(refs)


async def evaluate(loop: Loop, refs: Mapping[str, AdapterRef]) -> None:
    """Held-out scores of these versions, to the log and the console.

    Raises RolloutsFail when a run begins and not one problem can be scored.
    """
    for name, ref in refs.items():
        scores = await loop.evaluators[name].run(ref)
        if ref.version == 0 and len(scores.errors) == scores.n:
            raise RolloutsFail(
                f"adapter {name}: none of {scores.n} held-out problems could be scored; the first "
                f"one: {scores.errors[0]}"
            )
        loop.scores[name] = scores.means["strict" if "strict" in scores.means else "reward"]
        record = {"kind": "eval", "step": ref.version, "adapter": name, "scores": scores.means}
        loop.store.append_metrics(
            {**record, "n": scores.n, "errors": len(scores.errors), "seconds": scores.seconds}
        )
        if scores.errors:
            loop.console.warn(
                f"{len(scores.errors)} of {scores.n} held-out problems were not scored: "
                f"{scores.errors[0]}"
            )
        loop.console.evaluated(name, ref.version, scores.means)


async def _states(loop: Loop, names: Iterable[str]) -> dict[str, AdapterState]:
    engine = loop.trainer.engine
    return {name: await loop.trainer.call(engine.adapter_state, name) for name in names}


def _evaluation_due(loop: Loop, name: str, ref: AdapterRef) -> bool:
    experiment = loop.lanes[name].experiment
    due = ref.version % max(experiment.eval.every, 1) == 0 or ref.version == experiment.steps
    return name in loop.evaluators and due


async def _stage(loop: Loop, versions: Mapping[str, int], now: bool = False) -> Pending | None:
    finished = all(versions[name] >= lane.experiment.steps for name, lane in loop.lanes.items())
    if not (now or finished or loop.step % loop.checkpoint_every == 0):
        return None
    engine = loop.trainer.engine
    snapshots = {n: await loop.trainer.call(engine.snapshot, n) for n in sorted(loop.unsaved)}
    latest = loop.store.latest.adapters if loop.store.latest else {}
    records = {
        name: AdapterRecord(
            version=versions[name],
            optimizer_step=snapshots[name].step
            if name in snapshots
            else latest[name].record.optimizer_step,
            data_position=lane.next_index,
            admission={"pending": lane.pending()},
        )
        for name, lane in loop.lanes.items()
    }
    state = {"reward": loop.reward, "finished": finished}
    return await asyncio.to_thread(loop.store.stage, loop.step, snapshots, records, state)


async def _commit(loop: Loop, pending: Pending | None, refs: Mapping[str, AdapterRef]) -> None:
    if pending is None:
        return
    older = {n: lane.policy.ref for n, lane in loop.lanes.items() if lane.policy.ref is not None}
    state = {"score": dict(loop.scores)}
    # the scores of this very step came after the staging
    await asyncio.to_thread(loop.store.commit, pending, {**older, **refs}, state)
    loop.unsaved.clear()
    for group in loop.consumed:
        loop.spool.remove(group.adapter, [group.index])
    loop.consumed.clear()


def _retire(loop: Loop, refs: Sequence[AdapterRef]) -> None:
    """Forget replaced versions when what is in flight has drained; nobody waits for it."""
    for ref in refs:
        task = asyncio.create_task(loop.publisher.retire(ref))
        loop.retiring.add(task)
        task.add_done_callback(loop.retiring.discard)


def _log_step(
    loop: Loop,
    batch: Mapping[str, Sequence[Group]],
    metrics: Mapping[str, Mapping[str, float]],
    versions: Mapping[str, int],
    seconds: Mapping[str, float],
) -> None:
    idle = {
        "trainer_idle": seconds["rollout"] / seconds["step"],
        "rollout_idle": min(loop.collector.meter.lap() / seconds["step"], 1.0),
    }
    for name, groups in batch.items():
        lane = loop.lanes[name]
        stale = lane.errors["stale"]
        record = {
            "kind": "step",
            "step": versions[name],
            "adapter": name,
            "version": versions[name],
            "time": time.time(),
            **metrics[name],
            **loop.publisher.metrics,
            **idle,
            "dropped_stale": stale / (stale + len(groups)),
            "errors": dict(lane.errors),
            "seconds": dict(seconds),
        }
        lane.errors.clear()
        loop.store.append_metrics(record)
        loop.console.step(record)


def _log_rollouts(
    loop: Loop, batch: Mapping[str, Sequence[Group]], versions: Mapping[str, int]
) -> None:
    loop.store.append_rollouts(
        {
            "step": versions[group.adapter],
            "adapter": group.adapter,
            "prompt_id": group.prompt.id,
            "sample": rollout.sample,
            "reward": rollout.reward,
            "error": rollout.error,
            "version": group.min_version,
            "finish_reason": rollout.turns[-1].completion.finish_reason if rollout.turns else None,
            "prompt": group.prompt.messages[-1]["content"],
            "completion": "\n".join(turn.text for turn in rollout.turns),
            "metrics": dict(rollout.metrics),
        }
        for groups in batch.values()
        for group in groups
        for rollout in group.rollouts
    )


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
        laps = {**self._laps, "step": now - self._start}
        self._start, self._laps = now, {}
        return laps
