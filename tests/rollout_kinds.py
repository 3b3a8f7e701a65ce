"""The rollout engines that whole runs are tested on; a new engine is one more entry of ROLLOUTS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# the `rollout` section of the configuration; an engine whose environment is missing skips in
# `require`, with the command that makes it
ROLLOUTS: Mapping[str, Mapping[str, Any]] = {"embedded": {"kind": "embedded"}}


def require(kind: str) -> None:
    """Skip a test whose engine is not installed here."""
