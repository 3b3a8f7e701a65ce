"""What an environment calls to sample: one policy of one engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lorelei.rollout.contract import RolloutEngine
from lorelei.types import AdapterRef, GenerateRequest, Ints, SamplingParams, Turn


@dataclass(slots=True, kw_only=True)
class Policy:
    """Which version to sample from, and how; `ref` moves on when a version is published."""

    ref: AdapterRef | None  # none: the base model
    sampling: SamplingParams
    stream: str  # distinguishes random streams: the adapter's name, "eval", ...
    decode: Callable[[Ints], str]


class EngineSampler:
    """Implements env's Sampler: every turn is sampled from the newest version of the policy."""

    def __init__(self, engine: RolloutEngine, policy: Policy, key: str) -> None:
        self._engine, self._policy, self._key = engine, policy, key

    async def __call__(self, tokens: Ints, turn: int = 0) -> Turn:
        request = GenerateRequest(
            tokens=tokens,
            adapter=self._policy.ref,
            sampling=self._policy.sampling,
            key=f"{self._policy.stream}/{self._key}/{turn}",
        )
        completion = await self._engine.generate(request)
        return Turn(
            prompt=tokens, completion=completion, text=self._policy.decode(completion.tokens)
        )
