"""A train engine that survives the loss of its workers: it starts new ones and redoes the work."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorelei.lora.state import AdapterSnapshot, AdapterState
from lorelei.train.contract import CHANGES, EngineFailed, TrainEngine, WorkersLost
from lorelei.train.remote.forwarding import forwards
from lorelei.types import (
    AdamHyper,
    AdapterSpec,
    Batch,
    LossSpec,
    OptimStats,
    Policy,
    TrainOutputs,
)

LONGEST = 64  # calls that are kept before snapshots are taken without being asked for
PAUSE = 1.0  # seconds before the second restart in a row, doubled for each later one


@forwards
class Restarting:
    """Implements TrainEngine over engines that `make` starts, each in the place of a lost one.

    A new engine gets the adapters as they were in their last snapshots, then every call since
    that changed one, in order, and then the call that was lost: the caller sees the same results
    as without the loss. Snapshots are those that the caller takes or restores anyway.
    """

    def __init__(
        self,
        make: Callable[[], TrainEngine],
        restarts: int,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Start the first engine. restarts: most of them without a new snapshot in between.

        tell: hears of every loss. Raises what `make` raises.
        """
        self.tell = tell
        self._make, self._limit = make, restarts
        self._restarts = 0
        self._journal = _Journal()
        self._held: dict[Policy, AdapterState] = {}
        self._offloaded = self._closed = False
        self.engine = make()

    def forward(self, method: str, args: tuple[Any, ...]) -> Any:
        """Make a call, on as many engines as it takes; one that changes adapters is kept."""
        return self._change(method, args) if method in CHANGES else self._call(method, args)

    # What follows is written out because a restart has to know more of it than its call.

    def add_adapter(self, name: str, spec: AdapterSpec, seed: int = 0) -> None:
        self._change("add_adapter", (name, spec, seed))
        self._journal.adapters[name] = (spec, seed)

    def drop_adapter(self, name: str) -> None:
        self._change("drop_adapter", (name,))
        self._journal.forget(name)

    def hold(self, policy: Policy, state: AdapterState) -> None:
        self._held.pop(policy, None)  # as in an engine, which drops it before it takes the new one
        self._call("hold", (policy, state))
        self._held[policy] = state

    def release(self, policy: Policy) -> None:
        self._call("release", (policy,))
        self._held.pop(policy, None)

    def forward_backward(self, batch: Batch, losses: Mapping[str, LossSpec]) -> TrainOutputs:
        self._journal.accumulating |= set(batch.adapters)
        try:
            return self._change("forward_backward", (batch, losses))
        except BaseException:  # it has left no gradients
            self._journal.accumulating -= set(batch.adapters)
            raise

    def optim_step(self, hyper: Mapping[str, AdamHyper]) -> Mapping[str, OptimStats]:
        self._journal.accumulating -= hyper.keys()
        taken = self._change("optim_step", (hyper,))
        if len(self._journal.calls) >= LONGEST and not self._journal.accumulating:
            for name in tuple(self._journal.concerned):
                self.snapshot(name)
        return taken

    def snapshot(self, name: str) -> AdapterSnapshot:
        snapshot: AdapterSnapshot = self._call("snapshot", (name,))
        self._rest_on(name, snapshot)
        return snapshot

    def restore(self, name: str, snapshot: AdapterSnapshot) -> None:
        self._change("restore", (name, snapshot))
        self._journal.accumulating.discard(name)
        self._rest_on(name, snapshot)

    def offload(self) -> None:
        self._call("offload", ())
        self._offloaded = True

    def onload(self) -> None:
        self._call("onload", ())
        self._offloaded = False

    def close(self) -> None:
        """Close the engine; no other is started. Idempotent."""
        self._closed = True
        self.engine.close()

    def _rest_on(self, name: str, snapshot: AdapterSnapshot) -> None:
        if self._journal.rest_on(name, snapshot):
            self._restarts = 0

    def _change(self, method: str, args: tuple[Any, ...]) -> Any:
        self._journal.note(method, args)
        try:
            return self._call(method, args, done=len(self._journal.calls) - 1)
        except (ValueError, KeyError):
            self._journal.forget_unknown()
            raise

    def _call(self, method: str, args: tuple[Any, ...], done: int | None = None) -> Any:
        """done: how many of the journal's calls came before this one; None: all."""
        while True:
            try:
                return getattr(self.engine, method)(*args)
            except WorkersLost as loss:
                self._restart(loss, done)

    def _restart(self, loss: WorkersLost, done: int | None) -> None:
        """Bring a new engine to where the lost one was. Raises EngineFailed after too many."""
        reason: EngineFailed = loss
        while not self._closed:
            if self._restarts >= self._limit:
                raise EngineFailed(self._failure_message(reason)) from loss
            if self._restarts:
                time.sleep(PAUSE * 2 ** (self._restarts - 1))
            self._restarts += 1
            self.tell(f"{reason}; restart {self._restarts} of at most {self._limit}")
            try:
                self.engine = self._make()
                self._redo(done)
                return
            except WorkersLost as again:
                reason = again
        raise EngineFailed("the train engine is closed") from loss

    def _redo(self, done: int | None) -> None:
        journal, engine = self._journal, self.engine
        for name, (spec, seed, snapshot) in journal.base.items():
            engine.add_adapter(name, spec, seed)
            engine.restore(name, snapshot)
        for method, args in journal.calls[:done]:
            try:
                getattr(engine, method)(*args)
            except WorkersLost:
                raise
            except (ValueError, KeyError, EngineFailed):
                pass  # as the first time: a call that raises leaves its mark too
        for policy, state in self._held.items():
            engine.hold(policy, state)
        if self._offloaded:
            engine.offload()

    def _failure_message(self, reason: EngineFailed) -> str:
        if self._limit == 0:
            return f"{reason}; cluster.restarts: 0"
        return f"{reason}; given up after {self._limit} restarts without a finished step"


@dataclass(slots=True)
class _Journal:
    """The calls since a moment at which a snapshot of every adapter there was is known."""

    base: dict[str, tuple[AdapterSpec, int, AdapterSnapshot]] = field(default_factory=dict)
    calls: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)
    adapters: dict[str, tuple[AdapterSpec, int]] = field(default_factory=dict)  # there are now
    accumulating: set[str] = field(default_factory=set)  # adapters that may hold gradients
    concerned: set[str] = field(default_factory=set)  # adapters that the calls have changed
    _newer: dict[str, AdapterSnapshot] = field(default_factory=dict)  # after the calls

    def note(self, method: str, args: tuple[Any, ...]) -> None:
        """A call that changes adapters is about to be made."""
        self.calls.append((method, args))
        names = _names(args[0])
        self.concerned |= names
        for name in names:
            self._newer.pop(name, None)

    def rest_on(self, name: str, snapshot: AdapterSnapshot) -> bool:
        """A snapshot of now is known. Returns whether no earlier call needs to be kept."""
        if name in self.accumulating:  # a snapshot has no gradients
            return False
        self._newer[name] = snapshot
        if not self.concerned <= self._newer.keys():
            return False
        known = {name: snapshot for name, (_, _, snapshot) in self.base.items()} | self._newer
        self.base = {n: (*about, known[n]) for n, about in self.adapters.items()}
        self.calls.clear()
        self.concerned.clear()
        self._newer.clear()
        return True

    def forget_unknown(self) -> None:
        """A call was refused; it may have named an adapter that there is not."""
        self.concerned &= self.adapters.keys()

    def forget(self, name: str) -> None:
        """An adapter is dropped; one of its name may come later."""
        self.adapters.pop(name, None)
        self.accumulating.discard(name)
        self.concerned.discard(name)
        self._newer.pop(name, None)


def _names(subject: str | Batch | Mapping[str, Any]) -> set[str]:
    if isinstance(subject, str):
        return {subject}
    return set(subject.adapters if isinstance(subject, Batch) else subject)
