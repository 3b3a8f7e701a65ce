"""What an environment calls to sample: one policy of one engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from lorelei.rollout.contract import RolloutEngine
from lorelei.types import AdapterRef, GenerateRequest, Ints, SamplingParams, Turn


@dataclass(slots=True, kw_only=True)
class Policy:
    """Which version to sample from, and how; `ref` moves on when a version is published."""

    ref: AdapterRef | None  # none: the base model
    sampling: SamplingParams
    stream: str  # distinguishes random streams: the adapter's name, "eval", ...
    decode: Callable[[Ints], str]
    training: bool = True  # whether the loss will need the log-probabilities


class EngineSampler:
    """Implements env's Sampler: every turn is sampled from the newest version of the policy."""

    def __init__(self, engine: RolloutEngine, policy: Policy, key: str) -> None:
        self._engine, self._policy, self._key = engine, policy, key

    @property
    def pinned(self) -> Mapping[str, float]:
        """See Sampler."""
        if not self._policy.training:
            return {}
        names = ("temperature", "top_p", "top_k", "min_p")
        return {name: getattr(self._policy.sampling, name) for name in names}

    async def __call__(
        self,
        tokens: Ints,
        turn: int = 0,
        *,
        max_new_tokens: int | None = None,
        stop_strings: Sequence[str] = (),
    ) -> Turn:
        """See Sampler."""
        own = self._policy.sampling
        most = own.max_new_tokens if max_new_tokens is None else max_new_tokens
        request = GenerateRequest(
            tokens=tokens,
            adapter=self._policy.ref,
            sampling=replace(
                own,
                max_new_tokens=min(most, own.max_new_tokens),
                stop_strings=(*own.stop_strings, *stop_strings),
            ),
            key=f"{self._policy.stream}/{self._key}/{turn}",
        )
        completion = await self._engine.generate(request)
        return Turn(
            prompt=tokens, completion=completion, text=self._policy.decode(completion.tokens)
        )
