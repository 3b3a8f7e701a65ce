"""The Job contract: what trains one adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from lorelei.config.experiment import Experiment
from lorelei.publish.canary import Watched
from lorelei.train.work import Result, Work
from lorelei.types import AdapterRef, AdapterSpec


class JobFailed(ValueError):
    """A job cannot go on; the others can."""


class Job(Protocol):
    """What trains one adapter, and all that belongs to it. The loop does not know its kind.

    For each step the loop calls `work`, `tell` and `admit`, in this order. A ValueError of
    `work`, or of training on it, ends this job alone; what the other methods raise ends the run.
    """

    @property
    def name(self) -> str:
        """The adapter's."""
        ...

    @property
    def spec(self) -> AdapterSpec: ...

    @property
    def seed(self) -> int:
        """Of a fresh adapter."""
        ...

    @property
    def version(self) -> int:
        """Published updates so far: the adapter is name@v`version`."""
        ...

    @property
    def done(self) -> bool:
        """Whether there is no work any more."""
        ...

    @property
    def watched(self) -> Watched | None:
        """What the canary knows of the adapter; None: it is not watched."""
        ...

    async def begin(self, ref: AdapterRef) -> None:
        """Its first version of all is served; a first evaluation, before anything is committed."""
        ...

    async def work(self) -> Work:
        """The next piece of training; waits until there is one.

        Raises asyncio.CancelledError when the job is closed meanwhile.
        """
        ...

    async def tell(self, result: Result, ref: AdapterRef | None) -> Mapping[str, Any]:
        """What came of the work, before the step is committed; the train engine is as it left it.

        ref: the version that inference engines serve now, where the work asked for one. Evaluates
        when that is due. Returns what the step's record says of it; `step` is needed.
        """
        ...

    async def admit(self, ref: AdapterRef | None) -> None:
        """The step is done. ref: the version to sample from now, if there is a new one."""
        ...

    def saved(self) -> None:
        """A checkpoint holds what the job was told so far."""
        ...

    def state(self) -> Mapping[str, Any]:
        """Where it stands after what it was told, as plain JSON; `score` is for people."""
        ...

    def restore(self, version: int, state: Mapping[str, Any]) -> None:
        """Stand where `state` was taken. Called before anything else, at most once."""
        ...

    async def close(self) -> None:
        """Stop what runs. Idempotent."""
        ...


@dataclass(slots=True, kw_only=True, eq=False)
class OfExperiment:
    """What a job has of the experiment that it runs."""

    experiment: Experiment

    @property
    def name(self) -> str:
        return self.experiment.name

    @property
    def spec(self) -> AdapterSpec:
        return self.experiment.lora.spec()

    @property
    def seed(self) -> int:
        return self.experiment.seed


def step_metrics(result: Result) -> dict[str, float]:
    """What a step's record says of the optimizer step of the last round."""
    asked, done = result.work.rounds[-1].step, result.rounds[-1].step
    assert asked is not None and done is not None, "every round steps"
    return {
        "grad_norm": done.grad_norm,
        "optimizer_step": done.step,
        "lr": asked.lr,
        "train_seconds": result.seconds,
    }
