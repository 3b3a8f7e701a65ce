"""Hosts on one machine: network, process ids, host name and /tmp/ray of their own, on one switch.

Linux namespaces, made by root and gone with the process that made them.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import IO

import pytest

_INSIDE = """
hostname {name}
mount --bind {folder}/hosts /etc/hosts
mkdir -p /tmp/ray && mount --bind {folder} /tmp/ray
ip link set lo up
ip link set eth0 up
ip route add default via 10.77.0.254
echo ready
sleep infinity & wait
"""


class Host:
    """One of them."""

    def __init__(self, switch: str, number: int, folder: Path) -> None:
        self.name, self.address = f"host{number}", f"10.77.0.{number}"
        self._switch, self._port = switch, f"p{number}"
        self._space = f"{switch}-{number}"
        folder.mkdir()
        names = [f"10.77.0.{n} host{n}" for n in range(1, 10)]
        (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names]) + "\n")
        _ip("netns", "add", self._space)
        here = ("-n", switch, "link")
        _ip(*here, "add", self._port, "type", "veth", "peer", "eth0", "netns", self._space)
        _ip(*here, "set", self._port, "master", "br0", "up")
        _ip("-n", self._space, "addr", "add", f"{self.address}/24", "dev", "eth0")
        script = _INSIDE.format(name=self.name, folder=folder)
        spaces = ("--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
        self._holder = subprocess.Popen(
            ["ip", "netns", "exec", self._space, "unshare", *spaces, "bash", "-ec", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "ready\n", f"{self.name} does not come up"
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children")
        self._first = int(children.read_text())

    def start(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        out: IO[str] | None = None,
    ) -> subprocess.Popen[str]:
        """Start a command there, with this environment and no other."""
        words = [f"{key}={value}" for key, value in environment.items()]
        spaces = ("--net", "--mount", "--uts", "--pid", f"--wd={folder}")
        return subprocess.Popen(
            ["nsenter", "--target", str(self._first), *spaces, "env", "-i", *words, *command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command: str) -> str:
        """What a short command prints there."""
        spaces = ("--net", "--mount", "--uts", "--pid")
        done = subprocess.run(
            ["nsenter", "--target", str(self._first), *spaces, *command],
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    def unplug(self) -> None:
        """Cut its link at the switch: nobody is told."""
        _ip("-n", self._switch, "link", "set", self._port, "down")

    def plug(self) -> None:
        _ip("-n", self._switch, "link", "set", self._port, "up")

    def close(self) -> None:
        """End everything that runs there. Idempotent."""
        with suppress(ProcessLookupError):
            os.kill(self._first, 9)  # with the first process of a space all others end
        self._holder.wait()
        _ip("netns", "del", self._space, check=False)


class Hosts:
    """Several hosts and the switch between them."""

    def __init__(self, count: int) -> None:
        self._switch = f"lorelei{os.getpid()}"
        self._stack = ExitStack()
        self.all: list[Host] = []
        self._count = count

    def __enter__(self) -> Hosts:
        with ExitStack() as stack:
            root = stack.enter_context(tempfile.TemporaryDirectory(prefix="hosts-"))
            _ip("netns", "add", self._switch)
            stack.callback(_ip, "netns", "del", self._switch, check=False)
            _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "br0", "up")
            for number in range(1, self._count + 1):
                host = Host(self._switch, number, Path(root) / str(number))
                stack.callback(host.close)
                self.all.append(host)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()


def require_hosts() -> None:
    """Skip where hosts cannot be made."""
    try:
        with Hosts(1) as hosts:
            hosts.all[0].run("true")
    except (OSError, subprocess.CalledProcessError, AssertionError) as error:
        why = (getattr(error, "stderr", None) or str(error)).strip()
        pytest.skip(f"network namespaces are not permitted here: {why}")


def _ip(*words: str, check: bool = True) -> None:
    subprocess.run(["ip", *words], check=check, capture_output=True, text=True)
