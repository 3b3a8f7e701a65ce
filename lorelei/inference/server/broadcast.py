"""Broadcast groups: one sender, all workers of all servers. Runs inside servers too.

The group is not torch's default group and has no name there, so that it can be made, lost and made
again in a process that has groups for other purposes.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A broadcast group: rank 0 sends, every worker of every server receives."""

    name: str  # never used twice at one store
    host: str
    port: int  # of the TCPStore at which all ranks meet
    size: int
    first_rank: int  # of one server's workers
    backend: str  # "gloo" or "nccl"
    timeout: float  # seconds for forming the group and for each broadcast


def form(group: Group, rank: int) -> Any:
    """The process group, once all ranks are there. Raises RuntimeError when one stays away."""
    within = timedelta(seconds=group.timeout)
    store = TCPStore(group.host, group.port, None, False, timeout=within, wait_for_workers=False)
    store, size = PrefixStore(group.name, store), group.size
    if group.backend == "nccl":
        from torch.distributed import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        options._timeout = within
        return ProcessGroupNCCL(store, rank, size, options)
    from torch.distributed import ProcessGroupGloo

    options = ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue] # untyped
    options._timeout = within
    # else gloo takes the interface of this process's other groups, which may be loopback
    options._devices = [ProcessGroupGloo.create_device(hostname=_address_toward(group.host))]
    return ProcessGroupGloo(store, rank, size, options)


def _address_toward(host: str) -> str:
    """This machine's address as seen from `host`. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return probe.getsockname()[0]


def send(group: Any, data: bytes, device: torch.device) -> None:
    """Broadcast from rank 0. Raises RuntimeError when a receiver is gone or does not receive."""
    _broadcast(group, torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device))


def receive(group: Any, size: int, device: torch.device) -> bytes:
    """The `size` bytes that rank 0 sends. Raises RuntimeError when none come in time."""
    held = torch.empty(size, dtype=torch.uint8, device=device)
    _broadcast(group, held)
    return held.cpu().numpy().tobytes()


def _broadcast(group: Any, tensor: Tensor) -> None:
    from torch.distributed import BroadcastOptions  # pyright: ignore[reportPrivateImportUsage]

    options = BroadcastOptions()
    options.rootRank = 0
    group.broadcast([tensor], options).wait()
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()


def in_background(work: Callable[[], T]) -> Future[T]:
    """The result of `work` on a new thread, which does not keep the process from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # the border: whoever waits gets it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


@dataclass(frozen=True, slots=True)
class _Joined:
    forming: Future[Any]
    device: torch.device
    lock: threading.Lock = field(default_factory=threading.Lock)  # one broadcast after another


class Receiver:
    """What a worker receives by broadcast while the server decodes. No call waits."""

    def __init__(self) -> None:
        self._groups: dict[str, _Joined] = {}  # by name
        self.coming: dict[str, str] = {}  # the group, by name of an adapter that is broadcast

    def join(self, group: Group, rank: int, device: torch.device) -> None:
        """Begin to form a group."""
        if group.name not in self._groups:
            self._groups[group.name] = _Joined(in_background(lambda: form(group, rank)), device)

    def receive(self, name: str, group: str, size: int) -> Future[bytes]:
        """Begin to receive an adapter; the future raises RuntimeError. Raises ValueError."""
        joined = self._groups.get(group)
        if joined is None:
            raise ValueError(f"there is no broadcast group {group}")

        def work() -> bytes:
            formed = joined.forming.result()
            with joined.lock:
                return receive(formed, size, joined.device)

        self.coming[name] = group
        return in_background(work)

    def leave(self, group: str) -> list[str]:
        """Give up a group; who waits in it wakes up. Returns the adapters that came in it."""
        joined = self._groups.pop(group, None)
        if joined is not None and joined.forming.done() and not joined.forming.exception():
            formed = joined.forming.result()
            if hasattr(formed, "abort"):
                formed.abort()
        names = [name for name, of in self.coming.items() if of == group]
        for name in names:
            del self.coming[name]
        return names
