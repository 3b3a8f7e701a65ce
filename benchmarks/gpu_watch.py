"""Time and memory of a device, for the programs of the GPU benchmark."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

from benchmarks.gpu_cases import device


class Watch:
    """Seconds of rounds of one kind of work, and the most memory that was allocated meanwhile."""

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = {}
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """From when the device is idle until it is idle again."""
        _settle()
        start = time.perf_counter()
        yield
        _settle()
        self._seconds.setdefault(name, []).append(time.perf_counter() - start)

    def emit(self, work: str, **more: Any) -> None:
        """Print the seconds of every phase, the first round left out: it warms up."""
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
        measured = {name: [round(s, 5) for s in held[1:]] for name, held in self._seconds.items()}
        line = {"work": work, "seconds": measured, "peak_gib": round(peak, 2), **more}
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


def kernel_seconds(call: Callable[[], Any], repeats: int = 10) -> float:
    """The median time of a call on the device; without CUDA, of the call."""
    for _ in range(3):
        call()
    found: list[float] = []
    for _ in range(repeats):
        if torch.cuda.is_available():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            stop.synchronize()
            found.append(start.elapsed_time(stop) / 1e3)
        else:
            begun = time.perf_counter()
            call()
            found.append(time.perf_counter() - begun)
    return median(found)


def copy_bandwidth(count: int) -> float:
    """Bytes read and written in a second by a copy of `count` bytes."""
    source = torch.empty(count, dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    return 2 * count / kernel_seconds(lambda: target.copy_(source))


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
