"""How many groups of one adapter may run. Source: AReaL, 2025 (arXiv 2505.24298), section 4."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class Admission:
    """Counts groups of one adapter: bounded staleness without ever waiting for another adapter."""

    batch_size: int
    max_staleness: int
    max_concurrent: int
    version: int  # adapter version that new rollouts start on
    accepted: int  # groups finished and kept since the run began, trained on or not
    running: int = 0

    def capacity(self) -> int:
        """How many more groups may start now."""
        due = (self.max_staleness + self.version + 1) * self.batch_size
        return min(self.max_concurrent - self.running, due - (self.accepted + self.running))

    def start(self) -> None:
        """A group starts."""
        self.running += 1

    def accept(self) -> None:
        """A running group is finished and kept."""
        self.running -= 1
        self.accepted += 1

    def give_back(self) -> None:
        """A running group failed or was filtered: its room is free again."""
        self.running -= 1

    def forget(self) -> None:
        """An accepted group has become too stale to train on: its room is free again."""
        self.accepted -= 1
