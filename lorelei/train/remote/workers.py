"""The worker processes of a train engine, wherever they run, and those on this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

import lorelei
from lorelei.process import physical_cores
from lorelei.train.remote.network import interface_toward
from lorelei.train.remote.wire import read_frame
from lorelei.venvs.recipe import import_path

GRACE = 5.0  # seconds for a worker to end by itself
LOOPBACK = "127.0.0.1"


class WorkerGone(RuntimeError):
    """A worker cannot answer any more; the text says how it ended."""


class Workers(Protocol):
    """The processes of one group, by rank. Each answers one frame after another."""

    @property
    def pids(self) -> Sequence[int]:
        """The processes, each on its machine."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """Of each rank for people: its process and, when it is elsewhere, its node."""
        ...

    def ask(self, frame: bytes) -> Sequence[Future[bytes]]:
        """Send the frame to every rank. The answers raise WorkerGone."""
        ...

    def end(self, grace: float) -> None:
        """Collect all processes, killing those that do not end within `grace` seconds."""
        ...


class Launcher(Protocol):
    """Starts groups of workers."""

    def __call__(self, size: int, python: str) -> Workers:
        """`size` processes of the interpreter `python`. Raises EngineFailed."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RankInfo:
    """A rank's place among all, and on its machine."""

    rank: int
    size: int
    local_rank: int  # among those that see the same devices
    local_size: int
    threads: int
    host: str  # where the ranks meet
    port: int
    interface: str  # of the network to the others

    def environment(self, python: str) -> dict[str, str]:
        """What torch.distributed, its users and OpenMP read."""
        found = {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_WORLD_SIZE": str(self.local_size),
            "MASTER_ADDR": self.host,
            "MASTER_PORT": str(self.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is there; no rank opens one
            "GLOO_SOCKET_IFNAME": self.interface,
            "OMP_NUM_THREADS": str(self.threads),
            "MALLOC_ARENA_MAX": "1",  # see lorelei.process
        }
        if self.host != LOOPBACK:
            found["NCCL_SOCKET_IFNAME"] = f"={self.interface}"
        if python == sys.executable:
            package = str(Path(lorelei.__file__).parents[1])
            paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
            found["PYTHONPATH"] = os.pathsep.join(paths)
        else:
            found["PYTHONPATH"] = str(import_path())
        return found


class WorkerProcess:
    """One worker as a child of this process, in a new session.

    Ctrl-C is the controller's to handle.
    """

    def __init__(self, rank_info: RankInfo, python: str) -> None:
        self._channel, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [python, "-m", "lorelei.train.remote.worker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **rank_info.environment(python)},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def exchange(self, frame: bytes) -> bytes:
        """The answer. Raises WorkerGone."""
        try:
            self._channel.sendall(frame)
            return read_frame(self._channel)
        except (EOFError, OSError) as error:
            raise WorkerGone(self._failure_message()) from error

    def close_channel(self) -> None:
        """Close the channel, which tells the worker to end and wakes who waits for an answer."""
        try:
            self._channel.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the other end is closed
        finally:
            self._channel.close()

    def end(self, grace: float) -> None:
        """Collect the process, killing it when it does not end in time."""
        try:
            self._process.wait(grace)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _failure_message(self) -> str:
        """How the process ended, when its end of the channel is closed."""
        try:
            code = self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            return "closed its channel"
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"ended with exit status {code}"


class LocalWorkers:
    """Workers on this machine, which meet on loopback."""

    def __init__(self, size: int, python: str) -> None:
        self._store, port = open_store(LOOPBACK)
        self._processes: list[WorkerProcess] = []
        self._threads = ThreadPoolExecutor(size, thread_name_prefix="worker")
        threads = int(os.environ.get("OMP_NUM_THREADS", "0")) or physical_cores()
        for rank in range(size):
            rank_info = RankInfo(
                rank=rank,
                size=size,
                local_rank=rank,
                local_size=size,
                threads=max(threads // size, 1),
                host=LOOPBACK,
                port=port,
                interface=interface_toward(LOOPBACK),
            )
            self._processes.append(WorkerProcess(rank_info, python))
        self.pids: Sequence[int] = tuple(process.pid for process in self._processes)
        self.names: Sequence[str] = [f"{n} (pid {pid})" for n, pid in enumerate(self.pids)]

    def ask(self, frame: bytes) -> Sequence[Future[bytes]]:
        return [self._threads.submit(p.exchange, frame) for p in self._processes]

    def end(self, grace: float) -> None:
        for process in self._processes:
            process.close_channel()
        deadline = time.monotonic() + grace
        for process in self._processes:
            process.end(max(deadline - time.monotonic(), 0))
        self._threads.shutdown()


def open_store(host: str) -> tuple[TCPStore, int]:
    """The store at which ranks meet, in this process and at this address of it, and its port.

    No port can be lost to another program between its choice and its use.
    """
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    store = TCPStore(
        *(host, port, None, True),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, port
