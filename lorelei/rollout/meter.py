"""How long a rollout engine has had nothing to do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Meter:
    """Counts the requests of a controller in flight; without any, the engine is idle."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._since: float | None = clock()  # None: a request is in flight
        self._running = 0
        self._idle = 0.0

    @contextmanager
    def busy(self) -> Iterator[None]:
        """While a request is in flight."""
        if self._since is not None:
            self._idle += self._clock() - self._since
            self._since = None
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            if self._running == 0:
                self._since = self._clock()

    def lap(self) -> float:
        """Seconds of idleness since the last call."""
        now = self._clock()
        if self._since is not None:
            self._idle += now - self._since
            self._since = now
        idle, self._idle = self._idle, 0.0
        return idle
