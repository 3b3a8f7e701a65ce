"""The InferenceEngine contract: what samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lorelei.lora.state import AdapterState
from lorelei.types import AdapterRef, Completion, FinishReason, Floats, GenerateRequest, Ints


class EngineClosed(RuntimeError):
    """The engine was closed or its worker died; requests in flight get this too."""


def completion(
    adapter: AdapterRef | None, tokens: Sequence[int], logprobs: Sequence[float], end: FinishReason
) -> Completion:
    """All tokens [T] of one version; None: the base model."""
    version = adapter.version if adapter is not None else 0
    return Completion(
        tokens=np.array(tokens, dtype=np.int32),
        logprobs=np.array(logprobs, dtype=np.float32),
        versions=((version, len(tokens)),) if tokens else (),
        finish_reason=end,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """An inference engine's answer to `health`."""

    alive: bool
    running: int  # sequences being decoded
    waiting: int  # requests not started
    adapters: tuple[str, ...]  # served names that are loaded
    tokens_generated: int  # since start


class InferenceEngine(Protocol):
    """Samples completions of many adapter versions at once. All calls come from one event loop."""

    async def generate(self, request: GenerateRequest) -> Completion:
        """Sample one completion.

        A request with a `position` continues an interrupted answer: its first token is drawn with
        the random number of that position of the stream, or at least not with an earlier one.
        Cancelling the call aborts the request. Raises KeyError for an adapter version that is
        not loaded and ValueError for a prompt that does not fit the context.
        """
        ...

    async def score(
        self, sequences: Sequence[Ints], adapter: AdapterRef | None, temperature: float = 1.0
    ) -> list[Floats]:
        """Log-probabilities [T - 1] of tokens 1..T-1 of each sequence under an adapter version."""
        ...

    async def load(self, ref: AdapterRef, state: AdapterState) -> str | None:
        """Make a version available. Returns the digest of what was installed, if it can tell."""
        ...

    async def unload(self, ref: AdapterRef) -> None:
        """Forget a version. Requests that still use it finish first."""
        ...

    async def pause(self) -> None:
        """Stop after the running step; requests wait, nothing is lost."""
        ...

    async def resume(self) -> None:
        """Go on after `pause`."""
        ...

    async def abort(self, adapter: AdapterRef | None = None) -> None:
        """End every request now with finish_reason 'abort' and the tokens it has.

        adapter: only the requests of this version; one that is not loaded has none.
        """
        ...

    async def sleep(self) -> None:
        """Give memory back (KV cache, private weight copies) until `wake`."""
        ...

    async def wake(self) -> None:
        """Undo `sleep`."""
        ...

    async def health(self) -> Health:
        """Cheap; never blocks on generation."""
        ...

    async def close(self) -> None:
        """Stop; pending requests raise EngineClosed. Idempotent."""
        ...
