"""What makes a reward worker leave no process behind, however it, its reward or its starter ends.

A worker is two processes: one scores, its parent guards it. The guard adopts what the reward's
processes leave behind, and ends all of them when the scoring process or the starter has ended.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from pathlib import Path

from lorelei.process_guard import adopt_orphans, descendants, die_with_parent

MARK = "LORELEI_REWARD_WORKER"  # in the environment of every process of a worker
_SECONDS = 5.0  # to end what a reward has started


def fork_under_guard(requests: int, replies: int, starter: int) -> None:
    """Go on in a child; the parent guards it and never returns.

    requests: a pipe that only the starter writes to; its end is the starter's. replies: a pipe
    whose end is the child's. starter: its pid.
    """
    adopt_orphans()
    woken, wake = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wake, False)
    asked: list[int] = []
    signal.signal(signal.SIGCHLD, lambda number, _: None)  # it only wakes
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    signal.set_wakeup_fd(wake)
    guard = os.getpid()
    child = os.fork()
    if child == 0:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        os.close(woken)
        os.close(wake)
        os.setsid()  # a signal to its process group is none to the guard
        die_with_parent()
        if os.getppid() != guard:
            os._exit(1)
        return
    os.close(replies)
    poll = select.poll()
    poll.register(requests, 0)  # told when the other end is closed
    poll.register(woken, select.POLLIN)
    status: int | None = None
    while status is None and not asked and os.getppid() == starter:
        if any(fd == requests for fd, _ in poll.poll(1000)):
            break
        with contextlib.suppress(BlockingIOError):
            os.read(woken, 4096)
        status = _reap(child)
    found = _end_all(child)
    os._exit(_exit_code(found if status is None else status))


def end_unguarded(mark: str, session: int | None) -> None:
    """Kill what is left of a worker whose guard may have been killed (Linux).

    Processes are known by the mark in their environment, or by the session of the scoring process.
    """
    needle = f"{MARK}={mark}".encode()
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline:
        found = list[int]()
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                state, of_session = _stat(entry)
                known = of_session == session or needle in (entry / "environ").read_bytes()
                if state != "Z" and known:
                    found.append(int(entry.name))
        if not found:
            return
        _kill(found)
        time.sleep(0.01)


def _stat(entry: Path) -> tuple[str, int]:
    """(state, session) of a process."""
    # the name, in parentheses, may hold anything
    state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
    return state, int(session)


def _end_all(child: int) -> int:
    """Kill all descendants. Returns the child's wait status."""
    status: int | None = None
    deadline = time.monotonic() + _SECONDS
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    while time.monotonic() < deadline:
        left = descendants(os.getpid())
        _kill(left)
        found = _reap(child)
        status = found if status is None else status
        if not left:
            break
        time.sleep(0.002)
    return status or signal.SIGKILL


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _reap(child: int) -> int | None:
    """Collect what has ended. Returns the child's wait status, if it is among them."""
    status: int | None = None
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0] != 0:
            if ended[0] == child:
                status = ended[1]
    return status


def _exit_code(status: int) -> int:
    """As shells tell it: 128 and the number of the signal that ended a process."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code
