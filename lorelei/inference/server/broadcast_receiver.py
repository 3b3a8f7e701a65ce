"""Receives adapters by broadcast while the server decodes. Runs inside servers."""

from __future__ import annotations

import threading
from typing import Any

import torch

from lorelei.inference.server import broadcast
from lorelei.inference.server.broadcast import Group


class PendingGroup:
    """A broadcast group that forms in the background."""

    def __init__(self, group: Group, rank: int, device: torch.device) -> None:
        self.device = device
        self.group: Any = None
        self.error: str | None = None
        self.lock = threading.Lock()  # one broadcast after another
        self._thread = threading.Thread(target=self._form, args=(group, rank), daemon=True)
        self._thread.start()

    def _form(self, group: Group, rank: int) -> None:
        try:
            self.group = broadcast.form(group, rank)
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

    def __init__(self, pending_group: PendingGroup, size: int) -> None:
        self.data: bytes | None = None
        self.error: str | None = None
        self.pending_group, self._size = pending_group, size
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def _receive(self) -> None:
        try:
            group = self.pending_group.joined()
            with self.pending_group.lock:
                self.data = broadcast.receive(group, self._size, self.pending_group.device)
        except RuntimeError as error:
            self.error = str(error)

    def wait(self) -> None:
        """Until it is there or has failed."""
        self._thread.join()
