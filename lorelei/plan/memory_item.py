"""What a process holds, with its arithmetic."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryItem:
    """An amount of memory."""

    name: str
    bytes: int
    how: str  # the product that gives it, for people


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessGroup:
    """Processes that hold the same amounts."""

    role: str
    places: tuple[str, ...]  # of each process: a device, a URL or the CPU
    parts: tuple[MemoryItem, ...]  # of one process
    note: str = ""

    @property
    def bytes(self) -> int:
        """Of one process."""
        return sum(part.bytes for part in self.parts)
