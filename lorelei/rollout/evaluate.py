"""Held-out evaluation of an adapter version: the same problems, the same sampling, every time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lorelei.env.contract import Env, Episode
from lorelei.inference.contract import EngineClosed, InferenceEngine
from lorelei.rollout.meter import Meter
from lorelei.rollout.sampler import EngineSampler, Policy
from lorelei.types import AdapterRef, Example, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Means over the problems; an episode without a reward counts as zero."""

    means: dict[str, float]  # what the scorer reports, and 'reward' unless that has 'strict'
    n: int
    errors: tuple[str, ...]  # why episodes have no reward
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LossEvaluator:
    """Evaluates an adapter that learns from examples, by what an inference engine makes of them."""

    engine: InferenceEngine
    prompts: Sequence[Example]

    async def run(self, ref: AdapterRef | None) -> Scores:
        """Mean negative log-likelihood of the tokens to be learnt, in nats."""
        start = time.perf_counter()
        scored = await self.engine.score([example.tokens for example in self.prompts], ref)
        pairs = zip(self.prompts, scored, strict=True)
        learnt = np.concatenate([own_T[example.predicted[1:]] for example, own_T in pairs])
        return Scores(
            means={"loss": -float(learnt.mean())},
            n=len(self.prompts),
            errors=(),
            seconds=time.perf_counter() - start,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluator:
    """Evaluates one adapter."""

    engine: InferenceEngine
    prompts: Sequence[Prompt]
    env: Env
    policy: Policy  # its ref is ignored
    meter: Meter = field(default_factory=Meter)

    async def run(self, ref: AdapterRef | None) -> Scores:
        """Score every prompt once under a version, or under the base model."""
        start = time.perf_counter()
        policy = replace(self.policy, ref=ref)
        episodes = await asyncio.gather(*(self._episode(p, policy) for p in self.prompts))
        names = sorted({name for e in episodes for name in e.metrics})
        total = len(episodes)
        means = {n: sum(e.metrics.get(n, 0.0) for e in episodes) / total for n in names}
        if "strict" not in means:  # a scorer that tells strict from lenient has said it all
            means = {"reward": sum(e.reward or 0.0 for e in episodes) / total, **means}
        return Scores(
            means=means,
            n=total,
            errors=tuple(str(e.error) for e in episodes if e.error is not None),
            seconds=time.perf_counter() - start,
        )

    async def _episode(self, prompt: Prompt, policy: Policy) -> Episode:
        try:
            return await self.env.run(
                prompt, EngineSampler(self.engine, policy, prompt.id, self.meter)
            )
        except EngineClosed:
            raise
        except Exception as error:  # the border to environments
            return Episode(turns=(), reward=None, error=f"environment raised {error!r}")
