"""The reward pool: killable worker processes that score completions under a deadline."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from queue import SimpleQueue
from typing import Any, Literal

from lorelei.config.reward import ScorerConfig
from lorelei.reward.contract import NotANumber, RewardResult, Sample, as_float32, read_score
from lorelei.reward.environment import for_rewards
from lorelei.reward.group import current_member
from lorelei.reward.output import Output
from lorelei.reward.process import WorkerLost, WorkerProcess


def make_pool(reward: ScorerConfig) -> RewardPool:
    """The pool of a configuration. Raises ValueError when the scorer cannot be loaded."""
    return RewardPool(
        reward.kind,
        path=reward.path if reward.kind == "python" else None,
        answer_after=reward.answer_after if reward.kind == "reasoning_gym" else None,
        timeout=reward.timeout,
        workers=reward.workers,
        weights=reward.weights,
        limits=Limits(
            memory_gib=reward.memory_gib,
            start_timeout=reward.start_timeout,
            output_kib=reward.output_kib,
            env=reward.env if reward.kind == "python" else (),
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a worker may have; see the configuration."""

    memory_gib: float = 4.0
    start_timeout: float = 120.0
    output_kib: int = 256
    env: Sequence[str] = field(default=())


class RewardPool:
    """Scores completions in `workers` processes.

    A reward that hangs or dies costs its own sample and its worker, which is killed and replaced.
    `errors` counts failed scores by kind (see RewardResult).
    """

    def __init__(
        self,
        kind: Literal["reasoning_gym", "math_verify", "python"],
        *,
        path: str | None = None,
        answer_after: str | None = None,
        timeout: float = 10.0,
        workers: int = 2,
        weights: Mapping[str, float] | None = None,
        limits: Limits | None = None,
    ) -> None:
        """timeout: seconds for one call of the scorer, waiting for a free worker not counted.

        weights: makes the value a weighted sum of the scorer's metrics.

        Raises ValueError when the scorer cannot be loaded.
        """
        limits = limits or Limits()
        self.errors: Counter[str] = Counter()
        self.timeout = timeout
        self._weights = weights or {}
        self._limits = limits
        self._closed = False
        self._environment, withheld = for_rewards(limits.env)
        self._spec = {
            "kind": kind,
            "path": path,
            "answer_after": answer_after,
            "timeout": timeout,
            "memory_gib": limits.memory_gib,
            "withheld": withheld,
        }
        self._output = Output(limits.output_kib)
        self._all: set[WorkerProcess] = set()
        self._free: SimpleQueue[WorkerProcess] = SimpleQueue()
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="reward")
        try:
            started = [self._start() for _ in range(workers)]
            for worker in started:
                worker.wait_ready(tell)
        except BaseException:
            self.close()
            raise
        # the samples of one prompt are scored by one call
        self.whole_group = any(worker.whole_group for worker in started)
        for worker in started:
            self._free.put(worker)

    async def score(self, prompt_data: Mapping[str, Any], completion_text: str) -> RewardResult:
        """Score one completion; never raises for what the reward does.

        A reward of whole groups waits for the other rollouts of the group.
        """
        sample = Sample(data=prompt_data, completion=completion_text)
        member = current_member() if self.whole_group else None
        if member is not None:
            return await member.score(sample, self.score_all)
        (result,) = await self.score_all([sample])
        return result

    async def score_all(self, samples: Sequence[Sample]) -> list[RewardResult]:
        """Score completions by one call; more than one only for a reward of whole groups."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self.score_now, samples)

    def score_now(self, samples: Sequence[Sample]) -> list[RewardResult]:
        """As `score_all`, in this thread; as many at a time as there are workers."""
        results = [self._weighed(result) for result in self._ask(samples)]
        self.errors.update(r.error.split(":")[0] for r in results if r.error is not None)
        return results

    def _weighed(self, result: RewardResult) -> RewardResult:
        if not self._weights or result.value is None:
            return result
        if missing := sorted(self._weights.keys() - result.metrics.keys()):
            there = ", ".join(sorted(result.metrics)) or "none"
            error = f"not a number: reward.weights names {missing[0]!r}, the scorer has {there}"
            return RewardResult(value=None, metrics=result.metrics, error=error)
        value = sum(weight * result.metrics[name] for name, weight in self._weights.items())
        try:
            return replace(result, value=as_float32(value))
        except NotANumber as error:
            return RewardResult(
                value=None, metrics=result.metrics, error=f"not a number: reward.weights: {error}"
            )

    def close(self) -> None:
        """Kill the workers. Scores in flight come back as 'crashed', waiting ones are cancelled.

        Idempotent.
        """
        self._closed = True
        for worker in list(self._all):
            worker.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in list(self._all):
            self._discard(worker)
        self._output.close()

    def _ask(self, samples: Sequence[Sample]) -> list[RewardResult]:
        try:
            line = json.dumps([asdict(one) for one in samples])
        except (TypeError, ValueError, RecursionError) as error:
            return _all_failed(samples, f"not sent: {error}")
        worker = self._free.get()
        try:
            if worker.gone:  # what ended it was not this sample
                self._discard(worker)
                worker = self._start()
            worker.wait_ready(tell)
            reply = worker.ask(line, self.timeout)
            results = [_checked(RewardResult(**fields)) for fields in reply]
            if len(results) != len(samples):
                raise WorkerLost("crashed: its reply is of other samples")
        except (WorkerLost, ValueError, TypeError) as error:
            self._discard(worker)
            if not self._closed:
                self._free.put(self._start())
            reason = str(error) if isinstance(error, WorkerLost) else f"not started: {error}"
            return _all_failed(samples, reason)
        self._free.put(worker)
        return results

    def _start(self) -> WorkerProcess:
        worker = WorkerProcess(
            self._spec, self._environment, self._output.pipe, self._limits.start_timeout
        )
        self._all.add(worker)
        return worker

    def _discard(self, worker: WorkerProcess) -> None:
        worker.end()
        self._all.discard(worker)


def _checked(result: RewardResult) -> RewardResult:
    """A worker's word with its numbers read once more: a reward can change how it reads them."""
    if result.error is not None:
        return replace(result, value=None, error=str(result.error))
    try:
        value, metrics = read_score((result.value, dict(result.metrics)))
    except NotANumber as error:
        return RewardResult(value=None, error=f"not a number: {error}")
    return RewardResult(value=value, metrics=metrics)


def _all_failed(samples: Sequence[Sample], error: str) -> list[RewardResult]:
    return [RewardResult(value=None, error=error) for _ in samples]


def tell(text: str) -> None:
    """A line about what takes long, before there is a run to tell it."""
    sys.stderr.write(f"{text}\n")
