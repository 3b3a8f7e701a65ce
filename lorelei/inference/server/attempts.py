"""How often one call is tried."""

from __future__ import annotations

import asyncio

from lorelei.inference.server.client import ServerTrouble
from lorelei.inference.server.replicas import Replica

ATTEMPTS = 5  # of one call, each after a failure of a server
PAUSE = 0.2  # seconds before the second attempt, doubled for each later one


class Attempts:
    """The failures of one call so far. A server that failed is looked at before the next one."""

    def __init__(self, what: str) -> None:
        """what: the call, for people."""
        self._what = what
        self._failed = 0

    async def failed(self, replica: Replica, error: Exception) -> None:
        """Return when it is time for another attempt. Raises ServerTrouble after the last one."""
        replica.doubt()
        self._failed += 1
        if self._failed >= ATTEMPTS:
            raise ServerTrouble(
                f"{self._what}: {ATTEMPTS} attempts failed; the last one: {error}"
            ) from error
        await asyncio.sleep(PAUSE * 2 ** (self._failed - 1))
