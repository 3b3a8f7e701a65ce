"""The order of training items: an index that never ends, over items that do."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from lorelei.types import Longs


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
