"""The Env contract: what happens between a prompt and its reward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from lorelei.types import Ints, Prompt, Turn


class Sampler(Protocol):
    """Lets the adapter that is being trained answer."""

    async def __call__(self, tokens: Ints, turn: int = 0) -> Turn:
        """Continue `tokens` [P]. `turn` counts the calls of an episode: each draws its own numbers.

        Raises what the rollout engine raises.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """What became of one prompt. `error` says why there is no reward."""

    turns: tuple[Turn, ...]
    reward: float | None
    error: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])


class Env(Protocol):
    """Runs episodes, many at once; an object without state of its own."""

    async def run(self, prompt: Prompt, sample: Sampler) -> Episode:
        """Play one episode. Later turns hand `sample` the tokens so far and their own."""
        ...
