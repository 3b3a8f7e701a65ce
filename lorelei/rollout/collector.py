"""Keeps rollouts of one adapter running and gives complete batches.

Consumes prompts of a source and the versions that are admitted; produces batches of groups; waits
for environments, which wait for the inference engine and the reward. A failed rollout is data with
a reason: its siblings live on, and a group of which too little is left gives its room back.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from lorelei.algo.algorithm import PolicyAlgorithm
from lorelei.config.experiment import Experiment
from lorelei.data.contract import PromptSource
from lorelei.env.contract import Env
from lorelei.inference.contract import EngineClosed, InferenceEngine
from lorelei.reward.group import GroupScores
from lorelei.rollout.admission import Admission
from lorelei.rollout.meter import Meter
from lorelei.rollout.sampler import EngineSampler, Policy
from lorelei.store.spool import Spool
from lorelei.types import AdapterRef, Group, Prompt, Rollout

MAX_CONSECUTIVE_FAILED_GROUPS = 64  # before the adapter's job fails with the last reason


Unfit = Literal["failed", "flat", "stale"]  # too few rewards; all the same; too old when finished


class RolloutsFail(ValueError):
    """Group after group fails: something is wrong with the task, the reward or the model."""


@dataclass(slots=True, kw_only=True, eq=False)
class Collector:
    """Starts groups where admission has room; see `batch`."""

    experiment: Experiment
    algo: PolicyAlgorithm
    source: PromptSource
    env: Env
    policy: Policy
    admission: Admission
    engine: InferenceEngine
    spool: Spool
    meter: Meter = field(default_factory=Meter)
    next_index: int = 0
    redo: list[int] = field(default_factory=list[int])  # started before a crash, not finished
    running: set[int] = field(default_factory=set[int])
    finished: list[Group] = field(default_factory=list[Group])
    taken: list[Group] = field(default_factory=list[Group])  # given out, not yet trained on
    errors: Counter[str] = field(default_factory=Counter[str])
    partly_failed: int = 0  # groups, since the last step
    # (why, group) of those that nothing is trained on, since the last step
    dropped: list[tuple[Unfit, Group]] = field(default_factory=list[tuple[Unfit, Group]])
    # flat groups that were replaced for the next batch, at most algo.max_dropped_groups
    _replaced: list[Group] = field(default_factory=list[Group])
    _trained: list[int] = field(default_factory=list[int])  # since the last checkpoint
    _failed_in_a_row: int = 0
    _closing: bool = False
    _failure: BaseException | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set[asyncio.Task[None]])
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def name(self) -> str:
        return self.experiment.name

    @property
    def oldest(self) -> int:
        """The oldest version whose rollouts may be trained on now."""
        return self.admission.version - self.experiment.rollout.max_head_offpolicyness

    def pending(self) -> list[int]:
        """Indices below `next_index` that were not trained on: what a resumed run still owes."""
        waiting = (group.index for group in (*self.finished, *self.taken))
        return sorted({*self.redo, *self.running, *waiting})

    async def batch(self) -> list[Group]:
        """The next batch of groups, as soon as it is complete.

        Between two batches the caller trains, calls `trained`, publishes and calls `admit`.
        Raises RolloutsFail, and what the inference engine raises when it is closed.
        """
        self._start_groups()
        while len(self.finished) < self.algo.batch_size:
            await self._changed.wait()
            self._changed.clear()
            if self._failure is not None:
                raise self._failure
        # in the order they were started: the oldest would be the first to grow stale
        self.finished.sort(key=lambda group: group.index)
        size = self.algo.batch_size
        self.taken, self.finished = self.finished[:size], self.finished[size:]
        for group in self._replaced:
            self.dropped.append(("flat", group))
        self._replaced = []
        return self.taken

    def trained(self) -> None:
        """The batch that was given out is trained on."""
        self._trained += [group.index for group in self.taken]
        self.taken = []

    def forget_trained(self) -> None:
        """A checkpoint holds what was trained on: no crash needs its rollouts any more."""
        self.spool.remove(self.name, self._trained)
        self._trained = []

    def restore(self, version: int, next_index: int, pending: Sequence[int]) -> None:
        """Go on where a checkpoint was taken.

        Groups that a crash left finished are kept; what else was owed is sampled again.
        """
        owed = set(pending)
        found = self.spool.read(self.name)
        kept = {
            index: group
            for index, group in found.items()
            # a version that was rolled back with the crash is not one to learn from
            if (index in owed or index >= next_index) and group.newest_version <= version
        }
        self.spool.remove(self.name, found.keys() - kept.keys())
        self.finished = list(kept.values())
        self.next_index = max([next_index, *(index + 1 for index in kept)])
        self.redo = sorted((owed | set(range(next_index, self.next_index))) - kept.keys())
        self.admission.version = version
        self.admission.accepted = version * self.algo.batch_size + len(kept)

    def admit(self, ref: AdapterRef) -> None:
        """New rollouts use this version from now on."""
        self.policy.ref = ref
        self.admission.version = ref.version
        self._drop_stale()
        self._start_groups()

    async def close(self) -> None:
        """Stop all running groups; what is finished stays in `finished`. Idempotent."""
        self._closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _room(self) -> int:
        """How many more groups may start: what admission allows and the steps left can use."""
        total = self.experiment.steps * self.algo.batch_size
        unstarted = total - self.admission.accepted - self.admission.running
        return min(self.admission.capacity(), unstarted)

    def _start_groups(self) -> None:
        while not self._closing and self._failure is None and self._room() > 0:
            index = self.redo.pop(0) if self.redo else self.next_index
            self.next_index = max(self.next_index, index + 1)
            self.running.add(index)
            self.admission.start()
            task = asyncio.create_task(self._group(index))
            self._tasks.add(task)
            task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._failure = task.exception()
        self._start_groups()  # also while others train
        self._changed.set()

    def _drop_stale(self) -> None:
        fresh = [group for group in self.finished if group.min_version >= self.oldest]
        stale = [group for group in self.finished if group.min_version < self.oldest]
        for group in stale:
            self.admission.forget()
            self.errors["stale"] += 1
            self.dropped.append(("stale", group))
        self.spool.remove(self.name, [group.index for group in stale])
        self.finished = fresh

    async def _group(self, index: int) -> None:
        prompt = self.source.prompt(index)
        size = self.experiment.rollout.n_samples
        scores = GroupScores(size)
        rollouts = await asyncio.gather(
            *(self._rollout(prompt, index, n, scores) for n in range(size))
        )
        if self.algo.greedy_baseline:
            rollouts = await self._beside_greedy(prompt, index, rollouts)
        group = Group(adapter=self.name, index=index, prompt=prompt, rollouts=tuple(rollouts))
        self.errors.update(r.error.split(":")[0] for r in rollouts if r.error is not None)
        self.partly_failed += is_partly_failed(group)
        if found := unfit(group, self.algo):
            why, reason = found
            if why != "flat" or (most := self.algo.max_dropped_groups) is None:
                self.dropped.append((why, group))
                self._give_back(index, reason)
                return
            if (beyond := self._replace(group, most)) is None:
                return
            group = beyond
        if self.experiment.rollout.max_head_offpolicyness:
            await asyncio.to_thread(self.spool.put, group)
        self._failed_in_a_row = 0
        self.running.discard(group.index)
        self.admission.accept()
        self.finished.append(group)
        self._drop_stale()  # training may have gone on without it

    def _replace(self, group: Group, most: int) -> Group | None:
        """Another group starts for a flat one; None. Beyond `most`, a flat one to train on.

        Those that were started first are trained on, so that it does not depend on which of them
        are finished first.
        """
        self._replaced.append(group)
        self.running.discard(group.index)
        if len(self._replaced) <= most:
            self.admission.give_back()
            return None
        self._replaced.sort(key=lambda group: group.index)
        self.running.add(self._replaced[0].index)
        return self._replaced.pop(0)

    def _give_back(self, index: int, reason: str) -> None:
        self.running.discard(index)
        self.admission.give_back()
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= MAX_CONSECUTIVE_FAILED_GROUPS:
            raise RolloutsFail(
                f"adapter {self.name}: {MAX_CONSECUTIVE_FAILED_GROUPS} groups in a row gave "
                f"nothing to train on; the last one: {reason}"
            )

    async def _beside_greedy(
        self, prompt: Prompt, index: int, rollouts: Sequence[Rollout]
    ) -> list[Rollout]:
        """The rollouts with the reward of the greedy answer; without one they have none either.

        It is asked for after them, of the version that is the newest then.
        """
        sampling = replace(self.policy.sampling, temperature=0.0)
        policy = replace(self.policy, sampling=sampling, interruptible=False, training=False)
        sampler = EngineSampler(self.engine, policy, f"{index}/greedy", self.meter)
        greedy = await self._episode(prompt, sampler, 0, GroupScores(1))
        if greedy.reward is None:
            error = f"greedy answer: {greedy.error}"
            return [replace(one, reward=None, error=one.error or error) for one in rollouts]
        return [replace(one, baseline=greedy.reward) for one in rollouts]

    async def _rollout(
        self, prompt: Prompt, index: int, number: int, scores: GroupScores
    ) -> Rollout:
        sampler = EngineSampler(self.engine, self.policy, f"{index}/{number}", self.meter)
        return await self._episode(prompt, sampler, number, scores)

    async def _episode(
        self, prompt: Prompt, sampler: EngineSampler, number: int, scores: GroupScores
    ) -> Rollout:
        start = time.perf_counter()
        try:
            with scores.member(number):
                episode = await self.env.run(prompt, sampler)
        except EngineClosed:
            raise
        except Exception as error:  # the border to environments: any failure is one rollout's
            return Rollout(
                adapter=self.name,
                sample=number,
                turns=(),
                reward=None,
                error=f"environment raised {type(error).__name__}: {error}",
                seconds=time.perf_counter() - start,
            )
        return Rollout(
            adapter=self.name,
            sample=number,
            turns=episode.turns,
            reward=episode.reward,
            error=episode.error,
            metrics=episode.metrics,
            seconds=time.perf_counter() - start,
        )


def unfit(group: Group, algo: PolicyAlgorithm) -> tuple[Unfit, str] | None:
    """Why a group cannot be trained on, in a word and in words; None: it can."""
    rewards = [r.reward for r in group.rollouts if r.trainable]
    if len(rewards) < (2 if "group" in algo.statistics else 1):
        errors = sorted({r.error for r in group.rollouts if r.error is not None})
        return "failed", f"{len(rewards)} of {len(group.rollouts)} have a reward: {errors[:1]}"
    if algo.drop_zero_variance_groups and len(set(rewards)) == 1:
        return "flat", f"all rewards are {rewards[0]}"
    return None


def is_partly_failed(group: Group) -> bool:
    """Whether some rollouts of a prompt have a reward, and others an error in its place."""
    failed = [r.error is not None for r in group.rollouts if r.error != "aborted"]
    return any(failed) and not all(failed)
