"""RemoteEngine: a train engine whose ranks are worker processes, behind one object."""

from __future__ import annotations

import concurrent.futures
import sys
import time
from collections.abc import Sequence
from typing import Any

from lorelei.train.contract import EngineFailed, WorkersLost
from lorelei.train.kind import EngineSpec
from lorelei.train.remote.forwarding import forwards
from lorelei.train.remote.wire import (
    NETWORK,
    Call,
    Failure,
    Reply,
    Start,
    WireError,
    encode,
    parse,
)
from lorelei.train.remote.workers import GRACE, Launcher, LocalWorkers, WorkerGone

_ERRORS = {"ValueError": ValueError, "KeyError": KeyError}


@forwards
class RemoteEngine:
    """Implements TrainEngine. Every call goes to every rank; the first one's result is returned.

    When a worker crashes, times out or disagrees with the others, all are stopped: WorkersLost is
    raised, and EngineFailed by every call from then on.
    """

    def __init__(
        self,
        spec: EngineSpec,
        workers: int,
        python: str = sys.executable,
        timeout: float = 1800.0,
        launcher: Launcher = LocalWorkers,
    ) -> None:
        """Start the workers and wait until they have loaded the model.

        python: the workers' interpreter. timeout: seconds that any call may take.
        Raises ValueError when the engine cannot be built, EngineFailed when a worker ends.
        """
        self._timeout = timeout
        self._closed: str | None = None
        self.workers = launcher(workers, python)
        try:
            self._exchange("start", Start(spec=spec, timeout=timeout))
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> Sequence[int]:
        """The worker processes, by rank."""
        return self.workers.pids

    def close(self) -> None:
        """Let the workers end, and kill those that do not. Idempotent."""
        self._stop("the train engine is closed", GRACE)

    def forward(self, method: str, args: tuple[Any, ...]) -> Any:
        """Make a call on every rank."""
        if self._closed is not None:
            raise EngineFailed(self._closed)
        return self._exchange(method, Call(method=method, args=args))

    def _exchange(self, method: str, message: Start | Call) -> Any:
        deadline = time.monotonic() + self._timeout
        answers = self.workers.ask(encode(message))
        ranks = {answer: rank for rank, answer in enumerate(answers)}
        outcomes: dict[int, Reply | Failure] = {}
        while waiting := ranks.keys() - {answers[rank] for rank in outcomes}:
            ready, _ = concurrent.futures.wait(
                waiting,
                max(deadline - time.monotonic(), 0),
                return_when=concurrent.futures.FIRST_COMPLETED,
            )
            if not ready:
                late = [rank for rank in ranks.values() if rank not in outcomes]
                raise self._broken(f"no answer to {method} in {self._timeout:g} s", late)
            for answer in ready:
                rank = ranks[answer]
                try:
                    outcomes[rank] = parse(answer.result())
                except (WorkerGone, WireError) as error:
                    raise self._broken(f"{error} during {method}", [rank]) from error
        return self._result(method, [outcomes[rank] for rank in range(len(answers))])

    def _result(self, method: str, outcomes: Sequence[Reply | Failure]) -> Any:
        first, *_ = outcomes
        failures = {n: o for n, o in enumerate(outcomes) if isinstance(o, Failure)}
        if not failures and isinstance(first, Reply):
            return first.value
        # ranks that raise RankFailed only gave up because another one failed
        own = {n: f for n, f in failures.items() if f.kind != "RankFailed"} or failures
        number, failure = next(iter(own.items()))
        if len(failures) < len(outcomes):
            raise self._broken(f"{method} failed on some ranks only: {failure.text}", [number])
        if failure.kind == NETWORK:
            last = failure.text.strip().splitlines()[-1]
            raise self._broken(f"another rank was out of reach during {method} ({last})", [number])
        if failure.kind in _ERRORS:
            raise _ERRORS[failure.kind](failure.text)
        raise EngineFailed(f"train worker {number} failed in {method}: {failure.text}")

    def _broken(self, reason: str, ranks: Sequence[int]) -> WorkersLost:
        names = self.workers.names
        named = ", ".join(names[rank] for rank in ranks)
        text = f"train worker {named} of {len(names)}: {reason}; all workers were stopped"
        self._stop(text, grace=0)
        return WorkersLost(text)

    def _stop(self, reason: str, grace: float) -> None:
        if self._closed is None:
            self._closed = reason
            self.workers.end(grace)
