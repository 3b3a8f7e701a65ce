"""One server as an operating-system process; `launch` has launchers for clusters."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lorelei import process_guard

if TYPE_CHECKING:
    from lorelei.inference.server.backend import ServerBackend

GRACE = 10.0  # seconds for a server to end by itself
LOOPBACK = "127.0.0.1"
LAST_LINES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How a server is started."""

    command: tuple[str, ...]
    environment: Mapping[str, str]  # on top of ours


def no_proxy(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables under which a server reaches itself: SGLang ends when its warm-up request, to
    its own address, goes to a proxy.

    Curl and requests prefer the small letters, others the capitals.
    """
    hosts = f"{LOOPBACK},localhost,::1"
    names = ("no_proxy", "NO_PROXY")
    given = next((environment[name] for name in names if environment.get(name)), "")
    return dict.fromkeys(names, f"{given},{hosts}" if given else hosts)


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


class ServerProcess:
    """A running server with everything it starts, in a separate session.

    A guard process is its parent: nothing survives `stop`, the server's death, or this process's.
    """

    def __init__(self, launch: Launch, log: Path) -> None:
        """Start it; its output is appended to `log`."""
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            file.write(f"$ {' '.join(launch.command)}\n".encode())
            file.flush()
            self._start = file.tell()
            self._guard = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-S", process_guard.__file__),
                    *(str(os.getpid()), str(GRACE), *launch.command),
                ],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                # each adapter is received by a new thread, and each of malloc's arenas keeps
                # the most that any of them freed in it
                env={
                    **{"MALLOC_ARENA_MAX": "1", **os.environ},
                    **no_proxy(os.environ),
                    **launch.environment,
                },
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        return self._guard.poll() is None

    @property
    def pids(self) -> list[int]:
        """The server's processes, the one that was started first."""
        return process_guard.descendants(self._guard.pid)

    def log_tail(self) -> str:
        """The end of what this start of the server has printed."""
        with self.log.open("rb") as file:
            file.seek(self._start)
            lines = file.read().decode(errors="replace").splitlines()
        return "\n".join([line for line in lines if line.strip()][-LAST_LINES:])

    async def stop(self) -> None:
        await asyncio.to_thread(self.stop_now)

    def stop_now(self) -> None:
        """`stop` without an event loop."""
        with suppress(ProcessLookupError):
            if self.alive:
                self._guard.send_signal(signal.SIGTERM)
        try:
            self._guard.wait(3 * GRACE)
        except subprocess.TimeoutExpired:
            for pid in [*self.pids, self._guard.pid]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._guard.wait()


def free_port(host: str = LOOPBACK) -> int:
    """A port of this address that nobody uses now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


class LocalServer(ServerProcess):
    """Implements RunningServer at an address of this machine."""

    def __init__(self, backend: ServerBackend, number: int, token: str, folder: Path) -> None:
        port = free_port()
        self.url = f"http://{LOOPBACK}:{port}"
        log = folder / f"{backend.name}-{number}.log"
        super().__init__(backend.launch(number, port, token), log)


# starts replica `number` from (backend, number, token, folder of its log), without waiting until it
# is up; raises ValueError when it cannot be started there, ServerTrouble when it may be later
Launcher = Callable[["ServerBackend", int, str, Path], RunningServer]
