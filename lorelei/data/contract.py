"""The PromptSource contract: where an adapter's problems come from, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np

from lorelei.types import Longs, Prompt


class PromptSource(Protocol):
    """Endless training prompts by index, and a fixed held-out set that never occurs in them."""

    @property
    def notes(self) -> Sequence[str]:
        """What users are told of the data, such as rows that were left out."""
        ...

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


@lru_cache(maxsize=8)
def permutation(size: int, seed: int, epoch: int) -> Longs:
    """[size] a shuffle of 0..size-1."""
    # Raw bits, sorted: numpy keeps the bit streams of its generators stable between releases,
    # but not `Generator.permutation`, and a resumed run must see the same order.
    bits = np.random.PCG64([seed, epoch]).random_raw(size)
    return np.argsort(bits, kind="stable")


def item_at(index: int, size: int, seed: int) -> int:
    """The item at position `index` of the endless order: one permutation of `size` per epoch."""
    epoch, place = divmod(index, size)
    return int(permutation(size, seed, epoch)[place])
