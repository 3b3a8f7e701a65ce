"""How one adapter version comes to one server, now and again after a restart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lorelei.inference.server.replicas import Replica
from lorelei.lora.state import AdapterState
from lorelei.types import AdapterRef


class Delivery(Protocol):
    """Kept while the version is live."""

    async def to(self, replica: Replica) -> str | None:
        """Make the version available there. Returns the digest of what the workers hold."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ByBytes:
    """The tensors themselves, over HTTP."""

    ref: AdapterRef
    state: AdapterState

    async def to(self, replica: Replica) -> str | None:
        return await replica.load_bytes(self.ref, self.state)


@dataclass(frozen=True, slots=True, kw_only=True)
class ByFolder:
    """A PEFT folder on a disk that the server reads too."""

    ref: AdapterRef
    folder: Path

    async def to(self, replica: Replica) -> str | None:
        return await replica.load_folder(self.ref, self.folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class ByBroadcast:
    """What a broadcast has left in the workers' memory; the tensors where it did not reach."""

    ref: AdapterRef
    state: AdapterState

    async def to(self, replica: Replica) -> str | None:
        try:
            return await replica.load_received(self.ref)
        except KeyError:  # started after the broadcast
            return await replica.load_bytes(self.ref, self.state)
