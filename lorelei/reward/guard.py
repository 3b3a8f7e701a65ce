"""What makes a reward worker leave no process behind, however it, its reward or its starter ends.

A worker is three processes: one scores, its parent guards it, and the parent's parent guards both,
for rewards that end or stop their parent. A guard adopts what the processes below it leave behind,
and ends all of them when its child or the starter has ended.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time

from lorelei.process_guard import adopt_orphans, descendants, die_with_parent

_SECONDS = 5.0  # to end what a reward has started


def fork_under_guards(requests: int, replies: int, starter: int) -> None:
    """Go on in a child of a child; the parents guard it and never return.

    requests: a pipe that only the starter writes to; its end is the starter's. replies: a pipe
    whose end is the child's. starter: its pid.
    """
    for above in (starter, os.getpid()):
        _fork_under_guard(requests, replies, above)


def _fork_under_guard(requests: int, replies: int, starter: int) -> None:
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


def _end_all(child: int) -> int:
    """Kill all descendants. Returns the child's wait status."""
    status: int | None = None
    deadline = time.monotonic() + _SECONDS
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    while time.monotonic() < deadline:
        for pid in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            found = _reap(child)
        except ChildProcessError:  # what had no parent any more would be a child
            break
        status = found if status is None else status
        time.sleep(0.002)
    return signal.SIGKILL if status is None else status


def _reap(child: int) -> int | None:
    """Collect what has ended. Returns the child's wait status, if it is among them.

    Raises ChildProcessError when nothing is left that could end.
    """
    while (ended := os.waitpid(-1, os.WNOHANG))[0] != 0:
        if ended[0] == child:
            return ended[1]
    return None


def _exit_code(status: int) -> int:
    """As shells tell it: 128 and the number of the signal that ended a process."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code
