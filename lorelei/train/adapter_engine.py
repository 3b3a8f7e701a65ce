"""AdapterEngine: what every train engine does with adapters, around the passes of its model.

Every rank gets every call with the same arguments.
Shapes: I items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from lorelei.lora.state import AdapterSnapshot, AdapterState
from lorelei.parallel.ranks import Ranks
from lorelei.train.checks import (
    check_batch,
    check_held,
    check_losses,
    check_policy,
    check_snapshot,
    finite,
    under,
)
from lorelei.train.items import Outputs, piece_losses
from lorelei.train.layout import Piece
from lorelei.types import (
    BASE,
    CURRENT,
    AdamHyper,
    AdapterSpec,
    Batch,
    ItemOutputs,
    LossSpec,
    OptimStats,
    Policy,
    TrainOutputs,
)

# (micro-batch, log-probabilities [I], entropies [I]) -> the loss to differentiate
LossOf = Callable[[Piece, Tensor, Tensor], Tensor]


class Bank(Protocol):
    """Adapters by name, as this rank holds them; see lora.bank.AdapterBank."""

    @property
    def dtype(self) -> torch.dtype: ...
    def __contains__(self, name: str, /) -> bool: ...
    def __iter__(self) -> Iterator[str]: ...
    def __getitem__(self, name: str, /) -> Any: ...  # an adapter, which has a `spec`
    def add(self, name: str, spec: AdapterSpec, seed: int = 0) -> object: ...
    def drop(self, name: str) -> None: ...
    def check(self, name: str, tensors: Mapping[str, Tensor]) -> None: ...
    def load(self, name: str, tensors: Mapping[str, Tensor]) -> None: ...
    def state(self, name: str) -> AdapterState: ...  # full on the first rank


class Optimizer(Protocol):
    """AdamW of one adapter over all ranks that hold a part of it; see adam.AdapterOptimizer."""

    @property
    def step_count(self) -> int: ...
    def grad_norm(self) -> Tensor | None: ...
    def step(self, hyper: AdamHyper, norm: Tensor) -> OptimStats: ...
    def clear(self) -> None: ...
    def moments(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]: ...  # full on the first rank
    def restore(
        self, exp_avg: Mapping[str, Tensor], exp_avg_sq: Mapping[str, Tensor], step: int
    ) -> None: ...


B = TypeVar("B", bound=Bank)


class Passes(Protocol[B]):
    """The model of an engine, in this process alone or split over several."""

    @property
    def reports_outputs(self) -> bool: ...  # of ranks with the same items, one does
    def make_bank(self) -> B: ...
    def make_optimizer(self, bank: B, name: str) -> Optimizer: ...
    def run(self, batch: Batch, bank: B, loss_of: LossOf, steps: Mapping[str, int] | None) -> None:
        """Put this rank's share of a batch through the model, micro-batch by micro-batch.

        steps: optimizer steps of each adapter, which decide its dropout masks; gradients of the
        losses are added up. None: no gradients, no dropout. Segments whose adapter is not in the
        bank go through the base. Raises what `loss_of` raises, at a point where no rank waits.
        """
        ...

    def offload(self) -> None: ...
    def onload(self) -> None: ...


class AdapterEngine(Generic[B]):
    """Implements TrainEngine."""

    def __init__(self, passes: Passes[B], ranks: Ranks) -> None:
        self._passes, self._ranks = passes, ranks
        self._bank, self._held = passes.make_bank(), passes.make_bank()
        self._optimizers: dict[str, Optimizer] = {}
        self._accumulating: set[str] = set()  # adapters whose gradients wait for a step

    def add_adapter(self, name: str, spec: AdapterSpec, seed: int = 0) -> None:
        self._bank.add(name, spec, seed)
        self._optimizers[name] = self._passes.make_optimizer(self._bank, name)

    def drop_adapter(self, name: str) -> None:
        self._bank.drop(name)
        del self._optimizers[name]
        self._accumulating.discard(name)

    def hold(self, policy: Policy, state: AdapterState) -> None:
        check_policy(policy)
        if policy in self._held:
            self._held.drop(policy)
        self._held.add(policy, state.spec)
        try:
            self._held.load(policy, state.tensors)
        except ValueError:
            self._held.drop(policy)
            raise

    def release(self, policy: Policy) -> None:
        check_held(policy, self._held)
        self._held.drop(policy)

    def logprobs(self, batch: Batch, policy: Policy) -> ItemOutputs:
        check_batch(batch, self._bank)
        bank = self._bank
        if policy != CURRENT:
            batch, bank = under(batch, policy), self._held
        if policy not in (CURRENT, BASE):
            check_held(policy, self._held)
        outputs = Outputs(len(batch.items), self._bank.dtype)

        def loss_of(part: Piece, logprobs_I: Tensor, entropy_I: Tensor) -> Tensor:
            if self._passes.reports_outputs:
                outputs.put(part, logprobs_I, entropy_I, {})
            return logprobs_I.sum()  # nobody differentiates it

        with self._ranks.all_or_none():
            self._passes.run(batch, bank, loss_of, None)
        return outputs.items(self._ranks)

    def forward_backward(self, batch: Batch, losses: Mapping[str, LossSpec]) -> TrainOutputs:
        try:
            return self._forward_backward(batch, losses)
        except BaseException:
            self._clear(self._optimizers.keys() & set(batch.adapters))
            raise

    def _forward_backward(self, batch: Batch, losses: Mapping[str, LossSpec]) -> TrainOutputs:
        check_batch(batch, self._bank)
        check_losses(batch, losses)
        outputs = Outputs(len(batch.items), self._bank.dtype)
        steps = {name: self._optimizers[name].step_count for name in batch.adapters}

        def loss_of(part: Piece, logprobs_I: Tensor, entropy_I: Tensor) -> Tensor:
            results = piece_losses(part, losses, logprobs_I)
            if self._passes.reports_outputs:
                outputs.put(part, logprobs_I, entropy_I, results)
            return torch.stack([result.total for result in results.values()]).sum()

        with self._ranks.all_or_none():
            self._passes.run(batch, self._bank, loss_of, steps)
        items, sums = outputs.items(self._ranks), outputs.sums(self._ranks)
        self._accumulating |= set(batch.adapters)
        return TrainOutputs(
            items=items,
            loss={name: sums.get(name, {}).get("loss", 0.0) for name in batch.adapters},
            metrics={name: sums.get(name, {}) for name in batch.adapters},
        )

    def optim_step(self, hyper: Mapping[str, AdamHyper]) -> Mapping[str, OptimStats]:
        for name in hyper:
            self._bank[name]
        try:
            # every norm before the first step: one that is not finite must stop all of them
            norms = {name: finite(name, self._norm(name)) for name in hyper}
            return {n: self._optimizers[n].step(h, norms[n]) for n, h in hyper.items()}
        finally:
            self._clear(hyper)

    def _norm(self, name: str) -> Tensor | None:
        # asked of every rank alike, while only some may hold gradients
        return self._optimizers[name].grad_norm() if name in self._accumulating else None

    def _clear(self, names: Iterable[str]) -> None:
        for name in names:
            self._optimizers[name].clear()
            self._accumulating.discard(name)

    def adapter_state(self, name: str) -> AdapterState:
        return self._bank.state(name)

    def snapshot(self, name: str) -> AdapterSnapshot:
        state, optimizer = self._bank.state(name), self._optimizers[name]
        exp_avg, exp_avg_sq = optimizer.moments()
        return AdapterSnapshot(
            state=state, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, step=optimizer.step_count
        )

    def restore(self, name: str, snapshot: AdapterSnapshot) -> None:
        check_snapshot(name, self._bank[name].spec, snapshot)
        for moments in (snapshot.exp_avg, snapshot.exp_avg_sq):
            self._bank.check(name, moments)
        self._bank.load(name, snapshot.state.tensors)
        self._optimizers[name].restore(snapshot.exp_avg, snapshot.exp_avg_sq, snapshot.step)
        self._accumulating.discard(name)

    def offload(self) -> None:
        self._passes.offload()

    def onload(self) -> None:
        self._passes.onload()

    def close(self) -> None:
        self._optimizers.clear()
