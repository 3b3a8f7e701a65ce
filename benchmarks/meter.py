"""Wall-clock and CPU seconds of phases, and peak memory. Also runs in the peers' interpreter."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Meter:
    """Adds up seconds by phase for one step at a time; prints each step as a JSON line."""

    def __init__(self) -> None:
        self._phases: dict[str, list[float]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), _cpu()
        try:
            yield
        finally:
            held = self._phases.setdefault(name, [0.0, 0.0])
            held[0] += time.perf_counter() - wall
            held[1] += _cpu() - cpu

    def emit(self, **more: float) -> None:
        """Print and forget the phases: {"phase": [wall, cpu], ...}, peak RSS in GiB."""
        phases = {name: [round(x, 3) for x in pair] for name, pair in self._phases.items()}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        sys.stdout.write(json.dumps({**phases, "peak_gib": round(peak, 3), **more}) + "\n")
        sys.stdout.flush()
        self._phases.clear()


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
