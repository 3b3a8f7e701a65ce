"""How a process uses the machine: its CPU threads, and the memory that it keeps after freeing it.

Both are settled before torch is imported. Standard library only: servers import this too.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

LARGE = 1 << 20  # bytes

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # of glibc's mallopt
_SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def physical_cores() -> int:
    """Cores this process may run on, hyper-threads of one core counted once."""
    if not hasattr(os, "sched_getaffinity"):  # not Linux
        return os.cpu_count() or 1
    cores: set[str] = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(_SIBLINGS.format(cpu))
        cores.add(siblings.read_text().strip() if siblings.is_file() else str(cpu))
    return len(cores)


def set_threads(threads: int | None) -> None:
    """Set OMP_NUM_THREADS unless the user's environment already does, and share one heap."""
    os.environ.setdefault("OMP_NUM_THREADS", str(threads or physical_cores()))
    share_heap()


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
