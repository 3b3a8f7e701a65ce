"""How adapter versions reach the rollout engine."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lorelei.config.canary import WithCanary


class MemoryPublish(WithCanary):
    """A copy within the process, for the embedded engine."""

    kind: Literal["memory"] = Field(default="memory", description="Which publisher.")


PublishConfig = MemoryPublish
