"""The CPU threads of a run and the heap they share. Both are settled before torch is imported."""

from __future__ import annotations

import os
from pathlib import Path

from lorelei.config.heap import share_heap

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
