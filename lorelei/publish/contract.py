"""The Transport contract: how a new adapter version reaches an inference engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from lorelei.lora.state import AdapterState
from lorelei.types import AdapterRef


class PublishError(RuntimeError):
    """A version did not arrive, or what arrived is not what was sent."""


class Transport(Protocol):
    """How the tensors of a version travel."""

    async def send(self, ref: AdapterRef, state: AdapterState) -> str | None:
        """Make it available everywhere. Returns and raises like ServerEngine.install."""
        ...

    async def unload(self, ref: AdapterRef) -> None:
        """Forget it and its files, once nothing in flight uses it."""
        ...

    @property
    def metrics(self) -> Mapping[str, float]:
        """Counts since the start that a step's record should have."""
        ...

    async def close(self) -> None:
        """Give up what was kept between versions: folders, groups."""
        ...
