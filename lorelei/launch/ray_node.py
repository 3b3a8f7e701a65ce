"""What runs on the nodes of a Ray cluster: one process of a run in each actor."""

from __future__ import annotations

import os
import platform
import sys
import threading
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import ray

import lorelei
from lorelei.inference.server.backend import ServerBackend
from lorelei.inference.server.process import ServerProcess, free_port
from lorelei.train.remote.network import interface_toward
from lorelei.train.remote.workers import RankInfo, WorkerProcess


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """A node, and what is installed on it."""

    address: str
    auth: str  # of its Ray: "token", or nobody has to show one
    versions: tuple[tuple[str, str], ...]


def installed() -> tuple[tuple[str, str], ...]:
    """What must be the same on all machines of a run; Ray compares its own versions."""
    return (
        ("Lorelei", lorelei.__version__),
        ("torch", version("torch")),
        ("Python", platform.python_version()),
    )


class Host:
    """The actor. Its methods may run beside each other."""

    def __init__(self) -> None:
        self._worker: WorkerProcess | None = None
        self._server: ServerProcess | None = None

    def facts(self) -> NodeFacts:
        return NodeFacts(
            address=ray.util.get_node_ip_address(),
            auth=os.environ.get("RAY_AUTH_MODE", ""),
            versions=installed(),
        )

    # --- a train worker

    def start_worker(self, seat: RankInfo, python: str | None) -> int:
        """Its pid. python: None: this node's."""
        seat = replace(seat, interface=interface_toward(seat.host))
        self._worker = WorkerProcess(seat, python or sys.executable)
        return self._worker.pid

    def exchange(self, frame: bytes) -> bytes:
        """The worker's answer. Raises WorkerGone."""
        assert self._worker is not None
        return self._worker.exchange(frame)

    def end_worker(self, grace: float) -> None:
        if self._worker is not None:
            self._worker.close_channel()
            self._worker.end(grace)

    # --- a rollout server

    def start_server(self, backend: ServerBackend, number: int, token: str, folder: str) -> str:
        """Its URL. Raises ValueError when its environment is not installed on this node."""
        host = ray.util.get_node_ip_address()
        port = free_port(host)
        # Ray shows it no devices but its own
        first = 0 if os.environ.get("CUDA_VISIBLE_DEVICES") else number
        launch = backend.launch(first, port, token, host)
        self._server = ServerProcess(launch, Path(folder) / f"{backend.name}-{number}.log")
        return f"http://{host}:{port}"

    def server_ended(self) -> None:
        """Returns when the server has ended."""
        assert self._server is not None
        ended = threading.Event()
        while self._server.alive:
            ended.wait(0.5)

    def server_log_tail(self) -> str:
        return self._server.log_tail() if self._server is not None else ""

    def server_pids(self) -> list[int]:
        return self._server.pids if self._server is not None else []

    def end_server(self) -> None:
        if self._server is not None:
            self._server.stop_now()
