"""Which requests decode next: first come, first served, up to a number of rows.

Shapes: P prompt tokens.
"""

from __future__ import annotations

from asyncio import Future
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lorelei.inference.embedded.kv_cache import PromptCache
from lorelei.inference.stops import StopStrings
from lorelei.types import Completion, GenerateRequest, Ints

PromptKey = tuple[str | None, bytes]


@dataclass(slots=True, eq=False)
class Prompt:
    """A prompt under one adapter, kept while any row, waiting or running, needs it."""

    key: PromptKey
    number: int  # in order of arrival
    tokens: Ints  # [P]
    users: int = 0
    cache: PromptCache | None = None  # None: not prefilled

    @property
    def adapter(self) -> str | None:
        """The served name of the adapter."""
        return self.key[0]


@dataclass(slots=True, eq=False)
class Row:
    """One request from its arrival to its last token."""

    request: GenerateRequest
    future: Future[Completion]
    prompt: Prompt
    limit: int  # tokens to sample at most
    uniforms: NDArray[np.float64]  # [limit]
    stops: StopStrings | None
    tokens: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])


class Scheduler:
    """The waiting and the running rows. A running row's slot is its place in `running`."""

    def __init__(self, max_running: int, prefill_tokens: int) -> None:
        self._max_running, self._prefill_tokens = max_running, prefill_tokens
        self._prompts: dict[PromptKey, Prompt] = {}
        self._arrived = 0
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []

    def submit(self, row: Row) -> None:
        """Add a row behind all others."""
        row.prompt.users += 1
        self.waiting.append(row)

    def prompt(self, request: GenerateRequest) -> Prompt:
        """The prompt of a request, shared with every row of equal adapter and tokens."""
        adapter = request.adapter.served_name if request.adapter is not None else None
        key = (adapter, request.tokens.tobytes())
        if key not in self._prompts:
            self._arrived += 1
            self._prompts[key] = Prompt(key, self._arrived, request.tokens)
        return self._prompts[key]

    def admit(
        self, share_steps: Callable[[str | None, str | None], bool] = lambda *_: True
    ) -> list[Row]:
        """Start waiting rows while there are slots and the step's prefill budget lasts.

        share_steps: whether rows of two adapters can run at once; else the later ones wait.
        """
        admitted: list[Row] = []
        fresh: set[Prompt] = set()
        budget = self._prefill_tokens
        while self.waiting and len(self.running) < self._max_running:
            prompt = self.waiting[0].prompt
            if self.running and not share_steps(self.running[0].prompt.adapter, prompt.adapter):
                break
            if prompt.cache is None and prompt not in fresh:
                if fresh and len(prompt.tokens) > budget:
                    break
                budget -= len(prompt.tokens)
                fresh.add(prompt)
            admitted.append(self.waiting.popleft())
            self.running.append(admitted[-1])
        return admitted

    def leave(self, row: Row) -> int:
        """Remove a running row and return its slot, which the row of the last slot now has."""
        slot = self.running.index(row)
        last = self.running.pop()
        if last is not row:
            self.running[slot] = last
        self._release(row)
        return slot

    def drop(self, row: Row) -> None:
        """Remove a waiting row."""
        self.waiting.remove(row)
        self._release(row)

    def _release(self, row: Row) -> None:
        row.prompt.users -= 1
        if row.prompt.users == 0:
            del self._prompts[row.prompt.key]

    def by_prompt(self) -> list[int]:
        """The slots in use, rows of one adapter together, and in these rows of one prompt."""

        def place(slot: int) -> tuple[str, int, int]:
            prompt = self.running[slot].prompt
            return prompt.adapter or "", prompt.number, slot

        return sorted(range(len(self.running)), key=place)

    def uses(self, adapter: str) -> bool:
        """Whether any row, waiting or running, needs the adapter."""
        return any(prompt.adapter == adapter for prompt in self._prompts.values())

    def pending_steps(self, adapter: str | None) -> int:
        """How many tokens one of the adapter's rows may still sample, at most."""
        rows = (*self.running, *self.waiting)
        left = (r.limit - len(r.tokens) for r in rows if r.prompt.adapter == adapter)
        return max(left, default=0)
