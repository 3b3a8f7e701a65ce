"""Supervised fine-tuning of one adapter on answers that are given.

The held-out loss is what the train engine says of the held-out examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorelei.jobs.given import GivenJob
from lorelei.train.batch import example_batch
from lorelei.types import CURRENT, Batch, Example


@dataclass(slots=True, kw_only=True, eq=False)
class SftJob(GivenJob[Example]):
    """Implements Job."""

    async def batch(self, examples: Sequence[Example]) -> Batch:
        return example_batch(self.name, examples)

    def means(self, batch: Batch) -> dict[str, float]:
        """Mean negative log-likelihood of the predicted tokens, whatever their examples weigh."""
        return {"loss": -float(self.thread.engine.logprobs(batch, CURRENT).logprobs.mean())}
