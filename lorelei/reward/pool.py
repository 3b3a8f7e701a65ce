"""The reward pool: killable worker processes that score completions under a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import lorelei
from lorelei.config.reward import ScorerConfig
from lorelei.reward.contract import RewardResult

START_TIMEOUT = 120.0  # seconds until a worker has imported its scorer


def make_pool(reward: ScorerConfig) -> RewardPool:
    """The pool of a configuration. Raises ValueError when the scorer cannot be loaded."""
    return RewardPool(
        reward.kind,
        path=reward.path if reward.kind == "python" else None,
        answer_after=reward.answer_after if reward.kind == "reasoning_gym" else None,
        timeout=reward.timeout,
        workers=reward.workers,
        weights=reward.weights,
    )


class WorkerLost(Exception):
    """A worker did not answer: 'timeout' or 'crashed'."""


class RewardPool:
    """Scores completions in `workers` processes.

    A reward that hangs or dies costs its own sample and its worker, which is killed and replaced.
    `errors` counts failed scores by kind (see RewardResult).
    """

    def __init__(
        self,
        kind: str,
        *,
        path: str | None = None,
        answer_after: str | None = None,
        timeout: float = 10.0,
        workers: int = 2,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """timeout: seconds for one completion, waiting for a free worker not counted.

        weights: makes the value a weighted sum of the scorer's metrics.

        Raises ValueError when the scorer cannot be loaded.
        """
        self.errors: Counter[str] = Counter()
        self._timeout = timeout
        self._weights = weights or {}
        self._closed = False
        self._spec = {
            "kind": kind,
            "path": path,
            "answer_after": answer_after,
            "timeout": timeout,
        }
        self._all: set[_Worker] = set()
        self._free: SimpleQueue[_Worker] = SimpleQueue()
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="reward")
        started = [self._start() for _ in range(workers)]
        try:
            for worker in started:
                worker.wait_ready()
        except ValueError:
            self.close()
            raise
        for worker in started:
            self._free.put(worker)

    async def score(self, prompt_data: Mapping[str, Any], completion_text: str) -> RewardResult:
        """Score one completion; never raises for what the reward does."""
        line = json.dumps({"data": prompt_data, "completion": completion_text})
        loop = asyncio.get_running_loop()
        result = self._weighed(await loop.run_in_executor(self._threads, self._score, line))
        if result.error is not None:
            self.errors[result.error.split(":")[0]] += 1
        return result

    def _weighed(self, result: RewardResult) -> RewardResult:
        if not self._weights or result.value is None:
            return result
        if missing := sorted(self._weights.keys() - result.metrics.keys()):
            there = ", ".join(sorted(result.metrics)) or "none"
            error = f"not a number: reward.weights names {missing[0]!r}, the scorer has {there}"
            return RewardResult(value=None, metrics=result.metrics, error=error)
        value = sum(weight * result.metrics[name] for name, weight in self._weights.items())
        return replace(result, value=value)

    def close(self) -> None:
        """Kill the workers. Scores in flight come back as 'crashed', waiting ones are cancelled.

        Idempotent.
        """
        self._closed = True
        for worker in list(self._all):
            worker.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in list(self._all):
            self._discard(worker)

    def _score(self, line: str) -> RewardResult:
        """Runs in one of as many threads as there are workers: one worker is always free."""
        worker = self._free.get()
        try:
            worker.wait_ready()
            reply = worker.ask(line, self._timeout)
        except (WorkerLost, ValueError) as error:
            self._discard(worker)
            if not self._closed:
                self._free.put(self._start())
            reason = str(error) if isinstance(error, WorkerLost) else f"not started: {error}"
            return RewardResult(value=None, error=reason)
        self._free.put(worker)
        return RewardResult(**reply)

    def _start(self) -> _Worker:
        worker = _Worker(self._spec)
        self._all.add(worker)
        return worker

    def _discard(self, worker: _Worker) -> None:
        worker.kill()
        worker.reap()
        self._all.discard(worker)


class _Worker:
    """One process of `lorelei.reward.worker`, in its own process group."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        package = str(Path(lorelei.__file__).parents[1])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        threads = dict.fromkeys(["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"], "1")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lorelei.reward.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **threads, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,
        )
        self._ready = False
        self._buffer = b""
        with contextlib.suppress(BrokenPipeError):  # reported by wait_ready
            self._send(json.dumps(spec))

    def wait_ready(self) -> None:
        """Return when the scorer is loaded. Raises ValueError when it cannot be."""
        if self._ready:
            return
        try:
            reply = self._receive(START_TIMEOUT)
        except WorkerLost as lost:
            raise ValueError(f"reward: the worker process ended while starting ({lost})") from lost
        if "failed" in reply:
            raise ValueError(reply["failed"])
        self._ready = True

    def ask(self, line: str, timeout: float) -> dict[str, Any]:
        """The reply to a request. Raises WorkerLost."""
        try:
            self._send(line)
        except BrokenPipeError as error:
            raise WorkerLost("crashed: the worker was gone") from error
        return self._receive(timeout)

    def kill(self) -> None:
        """Kill the process and what it started."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def reap(self) -> None:
        """Collect a killed process and close its pipes."""
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def _receive(self, timeout: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        out = self._process.stdout.fileno()
        deadline = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            poll = select.poll()
            poll.register(out, select.POLLIN)
            if not poll.poll(max(deadline - time.monotonic(), 0) * 1000):
                raise WorkerLost("timeout")
            chunk = os.read(out, 65536)
            if not chunk:
                self.kill()  # it closed its pipe: end what is left of it
                raise WorkerLost(f"crashed: {self._status(self._process.wait())}")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    @staticmethod
    def _status(code: int) -> str:
        return f"exit status {code}" if code >= 0 else signal.Signals(-code).name
