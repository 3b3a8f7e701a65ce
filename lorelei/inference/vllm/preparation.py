"""Runs inside vLLM's workers: the part of a load that is done while the engine decodes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress

from torch import Tensor

from lorelei.lora.state import AdapterState
from lorelei.types import AdapterSpec

NICE = 5  # where they share a core, the thread that decodes comes first
# of a process that is just starting: vLLM binds its decoding thread to one of them later
_CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None


class Missing(RuntimeError):
    """What should have come has not."""


class Preparation:
    """An adapter that is read, checked and digested in the background."""

    def __init__(
        self,
        read: Callable[[], AdapterState],
        check: Callable[[AdapterState], None],
        again: bool,
    ) -> None:
        """read: raises Missing; again: it can be called again, and what it gave is not kept.

        check: raises ValueError for what the server cannot serve.
        """
        self.spec: AdapterSpec | None = None  # None: not there (yet)
        self.digest: str | None = None
        self.missing: str | None = None
        self.refused: str | None = None
        self._read, self._check, self._again = read, check, again
        self._fresh: dict[str, Tensor] | None = None
        self._thread = threading.Thread(target=self._prepare, daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def tensors(self) -> dict[str, Tensor]:
        """For vLLM to own: it scales B in place. Later calls copy, or read, again."""
        fresh, self._fresh = self._fresh, None
        if fresh is None:
            state = self._read()
            self.digest, fresh = state.digest(), self._own(state)
        return fresh

    def _prepare(self) -> None:
        if _CORES is not None:  # Linux, where both are a thread's own
            with suppress(OSError):
                os.sched_setaffinity(0, _CORES)
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        try:
            state = self._read()
            self._check(state)
            self.digest, self._fresh = state.digest(), self._own(state)
            if not self._again:
                self._read = lambda: state  # and what it came in can go
            self.spec = state.spec
        except Missing as error:
            self.missing = str(error)
        except ValueError as error:
            self.refused = str(error)

    def _own(self, state: AdapterState) -> dict[str, Tensor]:
        if self._again:
            return dict(state.tensors)
        return {name: tensor.clone() for name, tensor in state.tensors.items()}
