"""The Publisher contract: how a new adapter version reaches an inference engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from lorelei.lora.state import AdapterState
from lorelei.types import AdapterRef


class PublishError(RuntimeError):
    """A version did not arrive, or what arrived is not what was sent."""


class Publisher(Protocol):
    """Moves adapters, and nothing else, to inference engines."""

    async def publish(
        self, versions: Mapping[str, int], states: Mapping[str, AdapterState]
    ) -> dict[str, AdapterRef]:
        """Send {adapter: version number} and return when every replica can serve them.

        states: what each of these versions is; nothing may change the tensors before the return.
        Raises PublishError; then none of the new versions may be used.
        """
        ...

    async def retire(self, ref: AdapterRef) -> None:
        """Forget a version everywhere once nothing in flight uses it."""
        ...

    @property
    def metrics(self) -> Mapping[str, float]:
        """Counts since the start, for the records of steps."""
        ...

    async def close(self) -> None:
        """Give up what was kept between versions: folders, groups. Idempotent."""
        ...
