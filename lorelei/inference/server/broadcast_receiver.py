"""Receiving an adapter by broadcast while the server goes on decoding. Runs inside servers."""

from __future__ import annotations

import threading
from typing import Any

import torch

from lorelei.inference.server import broadcast


class PendingGroup:
    """A broadcast group that forms in the background: the engine goes on decoding."""

    def __init__(self, arguments: tuple[Any, ...], device: torch.device) -> None:
        self.device = device
        self.group: Any = None
        self.error: str | None = None
        self.lock = threading.Lock()  # one broadcast after another
        self._thread = threading.Thread(target=self._meet, args=arguments, daemon=True)
        self._thread.start()

    def _meet(self, *arguments: Any) -> None:
        try:
            self.group = broadcast.meet(*arguments)
        except RuntimeError as error:
            self.error = str(error)

    def joined(self) -> Any:
        """The group, once it is there. Raises RuntimeError when it failed."""
        self._thread.join()
        if self.group is None:
            raise RuntimeError(self.error)
        return self.group

    def abort(self) -> None:
        if self.group is not None and hasattr(self.group, "abort"):
            self.group.abort()


class PendingBroadcast:
    """An adapter that is being received in the background."""

    def __init__(self, meeting: PendingGroup, size: int) -> None:
        self.data: bytes | None = None
        self.error: str | None = None
        self.meeting, self._size = meeting, size
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def _receive(self) -> None:
        try:
            group = self.meeting.joined()
            with self.meeting.lock:
                self.data = broadcast.receive(group, self._size, self.meeting.device)
        except RuntimeError as error:
            self.error = str(error)

    def wait(self) -> None:
        """Until it is there or has failed."""
        self._thread.join()
