"""What a process keeps of memory that it has freed. Standard library only: servers import it."""

from __future__ import annotations

import ctypes
import os

LARGE = 1 << 20  # bytes

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # of glibc's mallopt


def share_heap() -> None:
    """One malloc arena: what the decode thread frees, the training thread can use.

    With an arena for each thread, each keeps the largest amount that it ever freed.
    """
    _set(_M_ARENA_MAX, 1, unless="MALLOC_ARENA_MAX")


def give_large_blocks_back() -> None:
    """Return every large block to the system when it is freed, unless the environment has a say.

    By itself glibc raises the size of what it returns up to 32 MiB. Logits [tokens, vocabulary] of
    changing sizes, or weights that are gathered and dropped, then lie between small blocks that
    stay, and their heap grows.
    """
    _set(_M_MMAP_THRESHOLD, LARGE, unless="MALLOC_MMAP_THRESHOLD_")


def _set(option: int, value: int, unless: str) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it
    if mallopt is not None and unless not in os.environ:
        mallopt(option, value)
