"""What differs between kinds of servers, seen from outside: how one is started, what it reports."""

from __future__ import annotations

import hashlib
from typing import Protocol

from lorelei.inference.server.client import Client
from lorelei.inference.server.process import LOOPBACK, Launch
from lorelei.types import GenerateRequest


class ServerBackend(Protocol):
    """One kind of server. Everything else is the same for all kinds: see `routes`."""

    @property
    def name(self) -> str:
        """As in `rollout.kind`."""
        ...

    @property
    def read_timeout(self) -> float:
        """Seconds without a byte of an answer after which a connection counts as stuck."""
        ...

    def launch(self, number: int, port: int, token: str, host: str = LOOPBACK) -> Launch:
        """How replica `number` is started at host:port. Raises ValueError without `make KIND`."""
        ...

    async def workers(self, client: Client) -> int:
        """How many processes hold the model: receivers of a broadcast.

        Raises ServerTrouble until the server is up, and ValueError for one that lacks what Lorelei
        needs, naming how to start it.
        """
        ...

    def seed(self, request: GenerateRequest) -> int:
        """Names the random stream of a request's tokens, as `stream_seed` does."""
        ...


def stream_seed(seed: int, key: str, position: int = 0) -> int:
    """A seed [0, 2**63) for the random stream named (seed, key), from a position on."""
    name = hashlib.blake2b(f"{seed}\0{key}\0{position}".encode(), digest_size=8).digest()
    return int.from_bytes(name, "little") >> 1
