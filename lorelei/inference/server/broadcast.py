"""Broadcast groups: one sender, all workers of all servers. Runs inside servers too.

The group is not torch's default group and has no name there, so that it can be made, lost and made
again in a process that has groups for other purposes.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]


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
