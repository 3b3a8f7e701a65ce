"""A job that teaches sentences one after another, each until the model knows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorelei.publish.canary import Watched
from lorelei.train.batch import example_batch
from lorelei.train.work import Result, Round, Work
from lorelei.types import AdamHyper, AdapterRef, AdapterSpec, Batch, Example, LossSpec

SFT = LossSpec(path="lorelei.algo.sft:loss", params={})


@dataclass(slots=True, kw_only=True, eq=False)
class PatientJob:
    """Implements Job."""

    name: str
    spec: AdapterSpec
    sentences: Sequence[Sequence[int]]  # token ids
    known_below: float = 0.5  # nats of a token
    lr: float = 1e-2
    seed: int = 0
    version: int = 0
    steps: int = 0
    learnt: int = 0  # sentences
    watched: Watched | None = None

    @property
    def done(self) -> bool:
        return self.learnt == len(self.sentences)

    async def begin(self, ref: AdapterRef) -> None:
        """Nothing is evaluated before the first step."""

    async def work(self) -> Work:
        one = Round(batch=self._batch(), loss=SFT, step=AdamHyper(lr=self.lr))
        return Work(adapter=self.name, rounds=(one,), publish=False)

    async def tell(self, result: Result, ref: AdapterRef | None) -> Mapping[str, Any]:
        self.steps += 1
        loss = result.rounds[0].metrics["loss"]
        if loss < self.known_below:
            self.learnt += 1
        return {"step": self.steps, "loss": loss, "learnt": self.learnt}

    async def admit(self, ref: AdapterRef | None) -> None:
        """Nothing is sampled."""

    def saved(self) -> None:
        """Nothing is kept for a crash."""

    def state(self) -> Mapping[str, Any]:
        return {"steps": self.steps, "learnt": self.learnt}

    def restore(self, version: int, state: Mapping[str, Any]) -> None:
        self.version, self.steps, self.learnt = version, state["steps"], state["learnt"]

    async def close(self) -> None:
        """Nothing runs."""

    def _batch(self) -> Batch:
        tokens = np.array(self.sentences[self.learnt], dtype=np.int32)
        example = Example(
            id=str(self.learnt), tokens=tokens, predicted=np.ones(len(tokens), np.bool_)
        )
        return example_batch(self.name, [example])
