"""A reward worker as the pool sees it: a process that is asked under a deadline."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lorelei

TELL_AFTER = 10.0  # seconds of silence until a start is said to be slow
GRACE = 0.25  # seconds for a worker to say by itself that what it awaited was late
_END = 5.0  # seconds for a guard to end its worker
_LONGEST_LINE = 1 << 24  # bytes


class WorkerLost(Exception):
    """A worker did not answer: 'timeout' or 'crashed: why'."""


class WorkerProcess:
    """One `lorelei.reward.worker` with all that its reward starts."""

    def __init__(
        self, spec: Mapping[str, Any], environment: Mapping[str, str], output: int, start: float
    ) -> None:
        """Start it. output: where what it prints goes. start: seconds it may take to be ready."""
        package = str(Path(lorelei.__file__).parents[1])
        paths = [package, *filter(None, [environment.get("PYTHONPATH")])]
        threads = dict.fromkeys(["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"], "1")
        own = {**threads, "PYTHONPATH": os.pathsep.join(paths)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lorelei.reward.worker", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            env={**environment, **own},
            start_new_session=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)
        self._started, self._start = time.monotonic(), start
        self._buffer = b""
        self.whole_group: bool | None = None  # None: not ready yet
        self._spec = {**spec, "id": secrets.token_hex(8)}

    def wait_ready(self, tell: Callable[[str], None]) -> None:
        """Return when the scorer is loaded. Raises ValueError when it cannot be."""
        if self.whole_group is not None:
            return
        deadline = self._started + self._start
        try:
            self._send(json.dumps(self._spec), deadline)
            early = min(deadline, self._started + TELL_AFTER)
            try:
                reply = self._receive(self._spec["id"], early)
            except WorkerLost as lost:
                if str(lost) != "timeout" or early == deadline:
                    raise
                tell(
                    f"reward: a worker has been starting for {TELL_AFTER:g} s; it may take "
                    f"reward.start_timeout: {self._start:g} s"
                )
                reply = self._receive(self._spec["id"], deadline)
        except WorkerLost as lost:
            if str(lost) == "timeout":
                raise ValueError(
                    f"reward.start_timeout: the reward was not loaded after {self._start:g} s; "
                    "raise it"
                ) from lost
            raise ValueError(
                f"reward: the worker process ended while starting ({lost}); it may hold "
                f"reward.memory_gib: {self._spec['memory_gib']:g} GiB"
            ) from lost
        if "failed" in reply:
            raise ValueError(reply["failed"])
        self.whole_group = reply["whole_group"]

    @property
    def gone(self) -> bool:
        """Whether it has ended: nobody is left who could reply."""
        poll = select.poll()
        poll.register(self._out, 0)
        return bool(poll.poll(0))

    def ask(self, samples: str, timeout: float) -> Any:
        """What it replies to samples, which are JSON. Raises WorkerLost."""
        number = secrets.token_hex(8)
        deadline = time.monotonic() + timeout + GRACE
        self._send(f'{{"id": "{number}", "samples": {samples}}}', deadline)
        return self._receive(number, deadline)

    def kill(self) -> None:
        """Have the guard end it with all that it started; any thread may call this."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGTERM)
                os.kill(self._process.pid, signal.SIGCONT)  # a reward may have stopped it

    def end(self) -> None:
        """Kill it, and return when nothing is left of it."""
        self.kill()
        try:
            self._process.wait(_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _send(self, line: str, deadline: float) -> None:
        left = memoryview(line.encode() + b"\n")
        poll = select.poll()
        poll.register(self._in, select.POLLOUT)
        while left:
            if not poll.poll(max(deadline - time.monotonic(), 0) * 1000):
                raise WorkerLost("timeout")
            try:
                left = left[os.write(self._in, left[: 1 << 16]) :]
            except BlockingIOError:
                continue
            except BrokenPipeError as error:
                raise WorkerLost(self._ended()) from error

    def _receive(self, number: str, deadline: float) -> Any:
        """What follows the line's number; lines without it are none of the worker's."""
        wanted = number.encode() + b" "
        poll = select.poll()
        poll.register(self._out, select.POLLIN)
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                raise WorkerLost("timeout")
            chunk = os.read(self._out, 1 << 16)
            if not chunk:
                raise WorkerLost(self._ended())
            *lines, self._buffer = (self._buffer + chunk).split(b"\n")
            for line in lines:
                if line.startswith(wanted):
                    with contextlib.suppress(ValueError):
                        return json.loads(line[len(wanted) :])
            self._buffer = self._buffer[-_LONGEST_LINE:]

    def _ended(self) -> str:
        try:
            code = self._process.wait(1.0)  # the guard ends what is left before it ends
        except subprocess.TimeoutExpired:
            return "crashed: it closed the pipe of its replies"
        if code > 128:  # as shells tell it
            with contextlib.suppress(ValueError):
                return f"crashed: {signal.Signals(code - 128).name}"
        return (
            f"crashed: exit status {code}"
            if code >= 0
            else f"crashed: {signal.Signals(-code).name}"
        )
