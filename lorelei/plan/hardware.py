"""The devices that a plan is made for, and which process gets which. No torch."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lorelei.config.errors import ConfigError
from lorelei.config.machine import MachineConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Alike machines. Without devices the processes share the CPUs."""

    nodes: int = 1
    devices: int = 0  # of each node
    memory: int | None = None  # bytes of each device or of the CPUs, where it is known
    here: bool = True  # this machine, whose devices may be shared

    @property
    def on_cpu(self) -> bool:
        return self.devices == 0


def has_accelerator() -> bool:
    """Whether a run would use an accelerator: a driver, and a build of torch that can use it.

    Found without torch, see model.backend.
    """
    try:
        build = version("torch")
    except PackageNotFoundError:
        return False
    if sys.platform == "darwin":
        return platform.machine() == "arm64"
    if build.endswith("+cpu") or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return False
    return any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/kfd"))  # NVIDIA, AMD


def this_machine() -> Hardware:
    """What is here, found without torch; the memory of its devices is not known."""
    if not has_accelerator():
        return Hardware(memory=_cpu_memory())
    cards = [p for p in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", p.name)]
    return Hardware(devices=max(len(cards), 1))


def _cpu_memory() -> int:
    """Bytes that processes may take here: the machine's, or a container's share of it."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroups of both versions
        with suppress(OSError, ValueError):  # 'max'
            found.append(int(Path("/sys/fs/cgroup", limit).read_text()))
    return min(found)


def wanted(machine: MachineConfig) -> Hardware:
    """What the configuration asks for, or what is here.

    Raises ConfigError for what says nothing without machine.devices.
    """
    if machine.devices is None:
        here = this_machine()
        if machine.nodes > 1:
            raise ConfigError(
                f"machine.nodes: {machine.nodes} are planned with machine.devices of each only; "
                "give both (--nodes and --devices), or neither for this machine"
            )
        if machine.memory is not None and here.on_cpu:
            raise ConfigError(
                f"machine.memory: {machine.memory!r} is of each accelerator and this machine has "
                "none; give machine.devices too (--devices), or leave it out"
            )
        return here if machine.memory is None else replace(here, memory=machine.memory_bytes)
    return Hardware(
        nodes=machine.nodes,
        devices=machine.devices,
        memory=machine.memory_bytes,
        here=False,
    )


def seat(hardware: Hardware, groups: Sequence[int]) -> list[tuple[str, ...]]:
    """A place for each process of each group, in order; a group stays on one node if it can.

    groups: how many processes each has. Raises ConfigError when the devices do not suffice.
    """
    if hardware.on_cpu:
        return [("cpu",) * size for size in groups]
    per, total = hardware.devices, hardware.nodes * hardware.devices
    taken = 0
    found: list[tuple[str, ...]] = []
    for size in groups:
        if taken % per + size > per and size <= per:
            taken += -taken % per  # the rest of the node stays free
        found.append(tuple(_place(hardware, (taken + n) % total) for n in range(size)))
        taken += size
    if taken > total and not hardware.here:
        nodes = f"{hardware.nodes} node{'s' * (hardware.nodes > 1)}"
        raise ConfigError(
            f"machine.devices: {per} on {nodes} have no room for {groups[0]} train ranks beside "
            f"{' + '.join(map(str, groups[1:])) or 0} processes of servers, each server on one "
            "node; raise it, or lower train's sizes or rollout.replicas"
        )
    return found


def _place(hardware: Hardware, number: int) -> str:
    node, device = divmod(number, hardware.devices)
    return f"gpu {device}" if hardware.nodes == 1 else f"node {node} gpu {device}"
