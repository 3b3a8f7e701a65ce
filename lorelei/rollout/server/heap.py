"""The heap of a server's process on a CPU. Of the standard library only: servers import it."""

from __future__ import annotations

import ctypes
import os

LARGE = 1 << 20  # bytes

_M_MMAP_THRESHOLD = -3  # of glibc's mallopt


def give_large_blocks_back() -> None:
    """Return every large block to the system when it is freed, unless the environment has a say.

    By itself glibc raises the size of what it returns up to 32 MiB. Logits [tokens, vocabulary] of
    changing sizes then lie between small blocks that stay, and their heap grows without end.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it
    if mallopt is not None and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt(_M_MMAP_THRESHOLD, LARGE)
