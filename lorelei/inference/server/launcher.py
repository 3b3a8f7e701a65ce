"""Starts inference servers: here on this machine; `launch` has launchers for clusters."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from lorelei.inference.server.backend import ServerBackend
from lorelei.inference.server.process import LOOPBACK, ServerProcess, free_port


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

    def log_tail(self) -> str:
        """The end of what it has printed."""
        ...

    async def stop(self) -> None:
        """End it, politely first. Idempotent."""
        ...


class Launcher(Protocol):
    """Starts servers."""

    def start(self, backend: ServerBackend, number: int, token: str, folder: Path) -> RunningServer:
        """Start replica `number`, without waiting until it is up. folder: for its log.

        Raises ValueError when it cannot be started there, ServerTrouble when it may be later.
        """
        ...


class LocalServer(ServerProcess):
    """Implements RunningServer at an address of this machine."""

    def __init__(
        self, backend: ServerBackend, number: int, token: str, folder: Path, host: str = LOOPBACK
    ) -> None:
        port = free_port(host)
        self.url = f"http://{host}:{port}"
        log = folder / f"{backend.name}-{number}.log"
        super().__init__(backend.launch(number, port, token, folder, host), log)


class LocalLauncher:
    """Implements Launcher: this machine's loopback address."""

    def start(self, backend: ServerBackend, number: int, token: str, folder: Path) -> RunningServer:
        return LocalServer(backend, number, token, folder)


LOCAL = LocalLauncher()
