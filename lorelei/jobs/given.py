"""What jobs share whose examples are given: a batch of rows a step, published when evaluated.

Consumes examples of a source; produces works of one batch; waits for nothing but what a kind of
job asks of the train engine itself.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from lorelei.algo.algorithm import Algorithm
from lorelei.data.examples import GivenSource
from lorelei.jobs.evaluation import EvaluationLog, due
from lorelei.jobs.job import OfExperiment, step_metrics
from lorelei.publish.canary import Watched
from lorelei.rollout.evaluate import Scores
from lorelei.train.engine_thread import EngineThread
from lorelei.train.work import Result, Round, Work
from lorelei.types import AdapterRef, Batch

T = TypeVar("T")


@dataclass(slots=True, kw_only=True, eq=False)
class GivenJob(OfExperiment, Generic[T]):
    """Implements Job, but for `batch` and `means`."""

    algo: Algorithm
    source: GivenSource[T]
    thread: EngineThread
    evaluations: EvaluationLog
    watched: Watched | None
    version: int = 0
    step: int = 0  # steps done; a version is published where an evaluation is due

    async def batch(self, examples: Sequence[T]) -> Batch:
        """The batch of some examples, with the streams that no policy fills."""
        raise NotImplementedError

    def means(self, batch: Batch) -> dict[str, float]:
        """What an evaluation says of the held-out examples. Runs in the engine's thread."""
        raise NotImplementedError

    @property
    def done(self) -> bool:
        return self.step >= self.experiment.steps

    async def begin(self, ref: AdapterRef) -> None:
        await self._evaluate()

    async def work(self) -> Work:
        size, steps = self.algo.batch_size, self.experiment.steps
        examples = [self.source.example(self.step * size + i) for i in range(size)]
        one = Round(
            batch=await self.batch(examples),
            loss=self.algo.loss(),
            step=self.experiment.optimizer.at(self.step, steps),
        )
        return Work(
            adapter=self.name,
            rounds=(one,),
            policies=self.algo.policies,
            publish=due(self.step + 1, self.experiment.eval.every or steps, steps),
            last=self.step + 1 >= steps,
        )

    async def tell(self, result: Result, ref: AdapterRef | None) -> Mapping[str, Any]:
        (one,), (asked,) = result.rounds, result.work.rounds
        self.step += 1
        if ref is not None:
            self.version = ref.version
            await self._evaluate()
        tokens = sum(len(segment.tokens) for segment in asked.batch.segments)
        return {
            "step": self.step,
            **one.metrics,
            "entropy": float(one.outputs.entropy.mean()),
            "trained_tokens": float(len(asked.batch.items)),
            "read_tokens": float(tokens),
            **step_metrics(result),
        }

    async def admit(self, ref: AdapterRef | None) -> None:
        """Nothing is sampled."""

    def saved(self) -> None:
        """Nothing is kept for a crash: the order of examples follows from the step."""

    def state(self) -> Mapping[str, Any]:
        return {"step": self.step, "score": self.evaluations.score}

    def restore(self, version: int, state: Mapping[str, Any]) -> None:
        self.version, self.step = version, state["step"]
        self.evaluations.score = state["score"]

    async def close(self) -> None:
        """Nothing runs."""

    async def _evaluate(self) -> None:
        if not self.source.held_out:
            return
        start = time.perf_counter()
        batch = await self.batch(self.source.held_out)
        means = await self.thread.call(self.means, batch)
        seconds, n = time.perf_counter() - start, len(self.source.held_out)
        self.evaluations.add(self.step, Scores(means=means, n=n, errors=(), seconds=seconds))
