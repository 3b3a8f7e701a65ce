"""Runs inside vLLM's workers: the part of a load that is done while the engine decodes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress

from torch import Tensor

from lorelei.inference.server.broadcast import in_background
from lorelei.lora.state import AdapterState
from lorelei.types import AdapterSpec

NICE = 5  # where they share a core, the thread that decodes comes first
# of a process that is just starting: vLLM binds its decoding thread to one of them later
_CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None


class Preparation:
    """An adapter that is read, checked and digested in the background."""

    def __init__(
        self,
        read: Callable[[], AdapterState],
        check: Callable[[AdapterState], None],
        again: bool,
    ) -> None:
        """again: `read` can be called again, and what it gave is not kept.

        check: raises ValueError for what the server cannot serve.
        """
        self.digest: str | None = None
        self._read, self._check, self._again = read, check, again
        self._fresh: dict[str, Tensor] | None = None
        # ValueError: the server cannot serve it; other errors: it has not come
        self.prepared = in_background(self._prepare)

    @property
    def ready(self) -> bool:
        return self.prepared.done() and self.prepared.exception() is None

    def tensors(self) -> dict[str, Tensor]:
        """For vLLM to own: it scales B in place. Later calls copy, or read, again."""
        fresh, self._fresh = self._fresh, None
        if fresh is None:
            state = self._read()
            self.digest, fresh = state.digest(), self._own(state)
        return fresh

    def _prepare(self) -> AdapterSpec:
        if _CORES is not None:  # Linux, where both are a thread's own
            with suppress(OSError):
                os.sched_setaffinity(0, _CORES)
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        state = self._read()
        self._check(state)
        self.digest, self._fresh = state.digest(), self._own(state)
        if not self._again:
            self._read = lambda: state  # and what it came in can go
        return state.spec

    def _own(self, state: AdapterState) -> dict[str, Tensor]:
        if self._again:
            return dict(state.tensors)
        return {name: tensor.clone() for name, tensor in state.tensors.items()}
