"""RemoteEngine: a train engine whose ranks are worker processes, seen as one object."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

import lorelei
from lorelei.config.threads import physical_cores
from lorelei.interpreters.recipe import import_path
from lorelei.lora.state import AdapterSnapshot, AdapterState
from lorelei.train.contract import EngineFailed
from lorelei.train.spec import EngineSpec
from lorelei.train.wire import Call, Failure, Reply, Start, WireError, encode, receive
from lorelei.types import (
    AdamHyper,
    AdapterSpec,
    Batch,
    ItemOutputs,
    LossSpec,
    OptimStats,
    Policy,
    TrainOutputs,
)

GRACE = 5.0  # seconds for a worker to end by itself
_ERRORS = {"ValueError": ValueError, "KeyError": KeyError}


class RemoteEngine:
    """Implements TrainEngine. Every call goes to every rank; the first one's result is returned.

    When a worker dies, hangs or disagrees with the others, all are stopped and every call raises
    EngineFailed from then on.
    """

    def __init__(
        self,
        spec: EngineSpec,
        workers: int,
        python: str = sys.executable,
        timeout: float = 1800.0,
    ) -> None:
        """Start the workers and wait until they have loaded the model.

        python: the workers' interpreter. timeout: seconds that any call may take.
        Raises ValueError when the engine cannot be built, EngineFailed when a worker ends.
        """
        self._timeout = timeout
        self._closed: str | None = None
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        # the workers meet at a store of this process: no port can be lost to another program
        self._store = TCPStore(
            *("127.0.0.1", port, None, True),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        self._ranks: list[_Rank] = []
        try:
            for number in range(workers):
                self._ranks.append(_Rank(number, workers, port, python, timeout))
            self._exchange("start", Start(spec=spec, timeout=timeout))
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> tuple[int, ...]:
        """The worker processes, by rank."""
        return tuple(rank.process.pid for rank in self._ranks)

    def add_adapter(self, name: str, spec: AdapterSpec, seed: int = 0) -> None:
        self._call("add_adapter", name, spec, seed)

    def drop_adapter(self, name: str) -> None:
        self._call("drop_adapter", name)

    def set_reference(self, name: str, state: AdapterState | None) -> None:
        self._call("set_reference", name, state)

    def logprobs(self, batch: Batch, policy: Policy) -> ItemOutputs:
        return self._call("logprobs", batch, policy)

    def forward_backward(self, batch: Batch, losses: Mapping[str, LossSpec]) -> TrainOutputs:
        return self._call("forward_backward", batch, losses)

    def optim_step(self, hyper: Mapping[str, AdamHyper]) -> Mapping[str, OptimStats]:
        return self._call("optim_step", hyper)

    def adapter_state(self, name: str) -> AdapterState:
        return self._call("adapter_state", name)

    def snapshot(self, name: str) -> AdapterSnapshot:
        return self._call("snapshot", name)

    def restore(self, name: str, snapshot: AdapterSnapshot) -> None:
        self._call("restore", name, snapshot)

    def offload(self) -> None:
        self._call("offload")

    def onload(self) -> None:
        self._call("onload")

    def close(self) -> None:
        """Let the workers end, and kill those that do not. Idempotent."""
        self._stop("the train engine is closed", GRACE)

    def _call(self, method: str, *args: object) -> Any:
        if self._closed is not None:
            raise EngineFailed(self._closed)
        return self._exchange(method, Call(method=method, args=args))

    def _exchange(self, method: str, message: Start | Call) -> Any:
        deadline = time.monotonic() + self._timeout
        frame = encode(message)
        outcomes: dict[int, Reply | Failure] = {}
        with selectors.DefaultSelector() as answers:
            for rank in self._ranks:
                with self._watched(rank, method):
                    rank.channel.sendall(frame)
                answers.register(rank.channel, selectors.EVENT_READ, rank)
            while answers.get_map():
                ready = answers.select(max(deadline - time.monotonic(), 0))
                if not ready:
                    silent = [r.number for r in self._ranks if r.number not in outcomes]
                    raise self._broken(f"no answer to {method} in {self._timeout:g} s", silent)
                for key, _ in ready:
                    rank: _Rank = key.data
                    answers.unregister(rank.channel)
                    with self._watched(rank, method):
                        outcomes[rank.number] = receive(rank.channel)
        return self._result(method, [outcomes[rank.number] for rank in self._ranks])

    def _result(self, method: str, outcomes: Sequence[Reply | Failure]) -> Any:
        failures = {n: o for n, o in enumerate(outcomes) if isinstance(o, Failure)}
        if not failures:
            return outcomes[0].value  # type: ignore[union-attr]
        # the others only say that they gave up too
        own = {n: f for n, f in failures.items() if f.kind != "RankFailed"} or failures
        number, failure = next(iter(own.items()))
        if len(failures) < len(outcomes):
            raise self._broken(f"{method} failed on some ranks only: {failure.text}", [number])
        if failure.kind in _ERRORS:
            raise _ERRORS[failure.kind](failure.text)
        raise EngineFailed(f"train worker {number} failed in {method}: {failure.text}")

    @contextlib.contextmanager
    def _watched(self, rank: _Rank, method: str) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError, WireError) as error:
            hung = isinstance(error, (TimeoutError, WireError))
            reason = str(error) if hung else rank.last_words()
            raise self._broken(f"{reason} during {method}", [rank.number]) from error

    def _broken(self, reason: str, ranks: Sequence[int]) -> EngineFailed:
        named = ", ".join(f"{n} (pid {self.pids[n]})" for n in ranks)
        text = f"train worker {named} of {len(self._ranks)}: {reason}; all workers were stopped"
        self._stop(text, grace=0)
        return EngineFailed(text)

    def _stop(self, reason: str, grace: float) -> None:
        if self._closed is not None:
            return
        self._closed = reason
        for rank in self._ranks:
            rank.channel.close()  # which tells the worker to end
        deadline = time.monotonic() + grace
        for rank in self._ranks:
            rank.end(max(deadline - time.monotonic(), 0))
        del self._store


class _Rank:
    """One worker process, in a session of its own: Ctrl-C is the controller's to handle."""

    def __init__(self, number: int, size: int, port: int, python: str, timeout: float) -> None:
        self.number = number
        self.channel, theirs = socket.socketpair()
        self.channel.settimeout(timeout)
        with theirs:
            self.process = subprocess.Popen(
                [python, "-m", "lorelei.train.worker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **_environment(number, size, port, python)},
                start_new_session=True,
            )

    def last_words(self) -> str:
        """How the process ended, when its end of the channel is closed."""
        try:
            code = self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            return "closed its channel"
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"ended with exit status {code}"

    def end(self, grace: float) -> None:
        """Collect the process, killing it when it does not end in time."""
        try:
            self.process.wait(grace)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _environment(number: int, size: int, port: int, python: str) -> dict[str, str]:
    """What torch.distributed, its users and OpenMP read."""
    threads = int(os.environ.get("OMP_NUM_THREADS", "0")) or physical_cores()
    found = {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is there; no rank opens one
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        "OMP_NUM_THREADS": str(max(threads // size, 1)),
        "MALLOC_ARENA_MAX": "1",  # see config.threads
    }
    if python == sys.executable:
        package = str(Path(lorelei.__file__).parents[1])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        found["PYTHONPATH"] = os.pathsep.join(paths)
    else:
        found["PYTHONPATH"] = str(import_path())
    return found
