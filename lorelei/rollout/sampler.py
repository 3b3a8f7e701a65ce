"""What an environment calls to sample: one policy of one engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from lorelei.inference.contract import InferenceEngine
from lorelei.rollout.meter import Meter
from lorelei.types import AdapterRef, Completion, GenerateRequest, Ints, SamplingParams, Turn


@dataclass(slots=True, kw_only=True)
class Policy:
    """Which version to sample from, and how; `ref` moves on when a version is published."""

    ref: AdapterRef | None  # None: the base model
    sampling: SamplingParams
    stream: str  # distinguishes random streams: the adapter's name, "eval", ...
    decode: Callable[[Ints], str]
    interruptible: bool = False  # an aborted answer goes on under a newer version, if there is one
    training: bool = True  # whether the loss will need the log-probabilities


class EngineSampler:
    """Implements env's Sampler: every turn is sampled from the newest version of the policy."""

    def __init__(
        self, engine: InferenceEngine, policy: Policy, key: str, meter: Meter | None = None
    ) -> None:
        self._engine, self._policy, self._key = engine, policy, key
        self._meter = meter or Meter()

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
        parts: list[Completion] = []
        while not parts or self._interrupted(request, parts[-1]):
            if parts:
                request = _continued(request, parts[-1], self._policy.ref)
            with self._meter.busy():
                parts.append(await self._engine.generate(request))
        completion = _joined(parts)
        return Turn(
            prompt=tokens, completion=completion, text=self._policy.decode(completion.tokens)
        )

    def _interrupted(self, request: GenerateRequest, part: Completion) -> bool:
        """Whether a newer version took over; any other abort is the answer's end."""
        return (
            self._policy.interruptible
            and part.finish_reason == "abort"
            and self._policy.ref != request.adapter
            and len(part.tokens) < request.sampling.max_new_tokens
        )


def _continued(
    request: GenerateRequest, part: Completion, ref: AdapterRef | None
) -> GenerateRequest:
    """The request for what is missing, which conditions on the part that is there."""
    count = len(part.tokens)
    left = request.sampling.max_new_tokens - count
    return replace(
        request,
        tokens=np.concatenate([request.tokens, part.tokens]),
        adapter=ref,
        sampling=replace(request.sampling, max_new_tokens=left),
        position=request.position + count,
    )


def _joined(parts: Sequence[Completion]) -> Completion:
    if len(parts) == 1:
        return parts[0]
    spans = [span for part in parts for span in part.versions]
    return Completion(
        tokens=np.concatenate([part.tokens for part in parts]),
        logprobs=np.concatenate([part.logprobs for part in parts]),
        versions=tuple(
            (version, sum(count for _, count in run))
            for version, run in groupby(spans, key=lambda span: span[0])
        ),
        finish_reason=parts[-1].finish_reason,
    )
