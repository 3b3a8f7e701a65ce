"""Processes that tests and acceptance wait for."""

from __future__ import annotations

import time
from pathlib import Path

from lorelei.inference.server.process import GRACE


def wait_gone(pids: list[int], seconds: float = GRACE) -> bool:
    """Whether all of these processes end in time."""
    deadline = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
