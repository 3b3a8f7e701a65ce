"""Runs one command and leaves no process behind, however it or its starter ends.

A separate program that needs the standard library only:
`python process_guard.py STARTER_PID GRACE COMMAND...`.
It starts the command, adopts what the command's processes leave behind (Linux), and ends all of
them when the command ends, when it gets SIGTERM, or when the starter is gone, be it by SIGKILL.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

POLL = 0.1  # seconds
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def main() -> int:
    """The command's exit status; minus the signal's number when one killed it."""
    starter, grace, command = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda caught, _: asked.append(caught))
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_guard, start_new_session=True
    )
    while process.poll() is None and not asked and os.getppid() == starter:
        _reap(process.pid)
        time.sleep(POLL)
    _end(process, grace)
    return process.returncode & 0xFF


def _end(process: subprocess.Popen[bytes], grace: float) -> None:
    """Ask the command to end, then kill it; then kill whatever it started."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        for pid in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.poll()
        _reap(process.pid)
        if process.returncode is not None and not descendants(os.getpid()):
            return
        time.sleep(POLL)


def descendants(root: int) -> list[int]:
    """The processes below `root`, zombies left out; none where there is no /proc."""
    children: dict[int, list[int]] = {}
    for pid, parent, zombie in _processes():
        if not zombie:
            children.setdefault(parent, []).append(pid)
    found, open_ = list[int](), [root]
    while open_:
        below = children.get(open_.pop(), [])
        found += below
        open_ += below
    return found


def _reap(keep: int) -> None:
    """Collect adopted processes that have ended; the command is its Popen's to collect."""
    for pid, parent, zombie in _processes():
        if zombie and parent == os.getpid() and pid != keep:
            with contextlib.suppress(OSError):
                os.waitpid(pid, os.WNOHANG)


def _processes() -> Iterator[tuple[int, int, bool]]:
    """(pid, parent's pid, whether it has ended and waits to be collected) of each."""
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            # the name, in parentheses, may hold anything
            state, parent = entry.read_text().rpartition(")")[2].split()[:2]
            yield int(entry.parent.name), int(parent), state == "Z"


def _die_with_guard() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())
