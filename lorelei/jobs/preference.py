"""Preference optimisation of one adapter on answers that are given and compared.

What an objective reads beside the log-probabilities of its policies and the signs of answers is
filled in here: `kl`, how far the policy has moved, for KTO. It is of the whole batch, so that the
train engine is asked for it before the batch is cut.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lorelei.algo.algorithm import Algorithm
from lorelei.data.pairs import mismatched
from lorelei.inference.contract import InferenceEngine
from lorelei.jobs.given import GivenJob
from lorelei.rollout.evaluate import Scores
from lorelei.train.batch import comparison_batch
from lorelei.train.items import measured
from lorelei.types import CURRENT, AdapterRef, Batch, Comparison, Floats


@dataclass(slots=True, kw_only=True, eq=False)
class PreferenceJob(GivenJob[Comparison]):
    """Implements Job."""

    max_tokens: int  # of a prompt and an answer

    async def batch(self, examples: Sequence[Comparison]) -> Batch:
        batch = comparison_batch(self.name, examples)
        if not _reads_kl(self.algo):
            return batch
        others = comparison_batch(self.name, mismatched(examples, self.max_tokens))
        return with_kl(batch, others, *await self.thread.call(self._both, others))

    def means(self, batch: Batch) -> dict[str, float]:
        """The loss of the held-out rows and what it reports, such as the preference accuracy."""
        engine = self.thread.engine
        filled = {
            stream: engine.logprobs(batch, policy).logprobs
            for stream, policy in self.algo.policies.items()
        }
        current_I = engine.logprobs(batch, CURRENT).logprobs
        return measured(_with_streams(batch, filled).items, self.algo.loss(), current_I)

    def _both(self, batch: Batch) -> list[Floats]:
        """Log-probabilities [I] of the adapter and of its reference, in the engine's thread."""
        policies = (CURRENT, self.algo.policies["reference"])
        return [self.thread.engine.logprobs(batch, policy).logprobs for policy in policies]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceEvaluator:
    """What an evaluation of the job says, by what an inference engine makes of held-out rows."""

    engine: InferenceEngine
    algo: Algorithm
    prompts: Sequence[Comparison]
    max_tokens: int  # of a prompt and an answer
    reference: AdapterRef | None = None  # that the engine has loaded; None: the base

    async def run(self, ref: AdapterRef | None) -> Scores:
        """Loss, preference accuracy and what else the objective reports."""
        start = time.perf_counter()
        batch = comparison_batch("held-out", self.prompts)
        current_I = await self._logprobs(self.prompts, ref)
        if "reference" in self.algo.policies:
            reference_I = await self._logprobs(self.prompts, self.reference)
            batch = _with_streams(batch, {"reference": reference_I})
        if _reads_kl(self.algo):
            rows = mismatched(self.prompts, self.max_tokens)
            both = [await self._logprobs(rows, policy) for policy in (ref, self.reference)]
            batch = with_kl(batch, comparison_batch("held-out", rows), *both)
        return Scores(
            means=measured(batch.items, self.algo.loss(), current_I),
            n=len(self.prompts),
            errors=(),
            seconds=time.perf_counter() - start,
        )

    async def _logprobs(self, rows: Sequence[Comparison], ref: AdapterRef | None) -> Floats:
        """[I] of the items of a comparison_batch of the rows."""
        answers = [(row.prompt, answer) for row in rows for answer in row.answers]
        scored = await self.engine.score([np.concatenate(both) for both in answers], ref)
        both = zip(answers, scored, strict=True)
        return np.concatenate([own_T[len(prompt) - 1 :] for (prompt, _), own_T in both])


def _reads_kl(algo: Algorithm) -> bool:
    return "kl" in algo.loss().streams


def with_kl(batch: Batch, others: Batch, current_I: Floats, reference_I: Floats) -> Batch:
    """The batch with the mean log-ratio of the sequences of `others`, at least 0."""
    ratio = (current_I.astype(np.float64) - reference_I).sum()
    kl = max(float(ratio) / (int(others.items.sequence.max()) + 1), 0.0)
    return _with_streams(batch, {"kl": np.full(len(batch.items), kl, dtype=np.float32)})


def _with_streams(batch: Batch, filled: Mapping[str, Floats]) -> Batch:
    items = replace(batch.items, streams={**batch.items.streams, **filled})
    return replace(batch, items=items)
