"""The PromptSource contract: where an adapter's problems come from."""

from __future__ import annotations

from typing import Protocol

from lorelei.types import Prompt


class PromptSource(Protocol):
    """Endless training prompts by index, and a fixed held-out set that never occurs in them."""

    def prompt(self, index: int) -> Prompt:
        """The training prompt at `index` >= 0: a pure function of (task, seed, index).

        An epoch is a seeded permutation; indices run on over epochs. To resume, keep the index.
        """
        ...

    def eval_prompts(self, n: int) -> list[Prompt]:
        """The first `n` held-out prompts, the same for every seed.

        Raises ValueError when fewer are held out.
        """
        ...
