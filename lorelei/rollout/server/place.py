"""Where rollout servers are started: on this machine, or wherever `launch` brings them."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from lorelei.rollout.server.dialect import Dialect
from lorelei.rollout.server.process import LOOPBACK, ServerProcess, free_port


class RunningServer(Protocol):
    """A server that was started, and may have ended since."""

    @property
    def url(self) -> str: ...

    @property
    def alive(self) -> bool: ...

    @property
    def pids(self) -> list[int]:
        """Its processes, each on its machine."""
        ...

    def last_words(self) -> str:
        """The end of what it has printed."""
        ...

    async def stop(self) -> None:
        """End it, politely first. Idempotent."""
        ...


class Place(Protocol):
    """Starts servers."""

    def start(self, dialect: Dialect, number: int, token: str, folder: Path) -> RunningServer:
        """Start replica `number`, without waiting until it is up. folder: for its log.

        Raises ValueError when it cannot be started there, ServerTrouble when it may be later.
        """
        ...


class LocalServer(ServerProcess):
    """Implements RunningServer at an address of this machine."""

    def __init__(
        self, dialect: Dialect, number: int, token: str, folder: Path, host: str = LOOPBACK
    ) -> None:
        port = free_port(host)
        self.url = f"http://{host}:{port}"
        log = folder / f"{dialect.name}-{number}.log"
        super().__init__(dialect.launch(number, port, token, folder, host), log)


class Here:
    """Implements Place: this machine's loopback address."""

    def start(self, dialect: Dialect, number: int, token: str, folder: Path) -> RunningServer:
        return LocalServer(dialect, number, token, folder)


HERE = Here()
