"""The Env contract: what happens between a prompt and its reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

from lorelei.data.chat import ChatTemplate
from lorelei.types import Ints, Prompt, Turn


class Sampler(Protocol):
    """Lets the adapter that is being trained answer."""

    @property
    def pinned(self) -> Mapping[str, float]:
        """What a caller may not change about the distribution: {temperature: 1.0, top_p: 1.0, ...}.

        Empty in evaluation, whose section of the configuration decides alone.
        """
        ...

    async def __call__(
        self,
        tokens: Ints,
        turn: int = 0,
        *,
        max_new_tokens: int | None = None,
        stop_strings: Sequence[str] = (),
    ) -> Turn:
        """Continue `tokens` [P]. `turn` counts the calls of an episode: each draws its own numbers.

        max_new_tokens can only lower the run's own limit; stop_strings come besides the run's.
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
    """Runs episodes, many at once; keeps no state between them."""

    async def run(self, prompt: Prompt, sample: Sampler) -> Episode:
        """Play one episode. Later turns hand `sample` the tokens so far and their own."""
        ...


class Line(Protocol):
    """One episode's connection to the model, for an OpenAI client."""

    @property
    def base_url(self) -> str: ...

    @property
    def api_key(self) -> str:
        """Identifies the episode; invalid once it is over."""
        ...

    @property
    def turns(self) -> tuple[Turn, ...]:
        """What was sampled so far, in the order in which it was asked for."""
        ...

    @property
    def failure(self) -> Exception | None:
        """What the rollout engine raised, if it failed."""
        ...


class Endpoint(Protocol):
    """Opens lines; one of them serves all episodes of a run."""

    def open(
        self, sample: Sampler, model: str, max_turns: int, chat: ChatTemplate
    ) -> AbstractAsyncContextManager[Line]:
        """A line for one episode. model: the name that clients give. chat: of its adapter."""
        ...
