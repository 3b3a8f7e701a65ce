"""BankEngine: what every train engine on an AdapterBank does, around the passes of its model.

A batch is cut into micro-batches of whole trees; tokens of several adapters share a micro-batch.
Every rank gets every call with the same arguments.
Shapes: I items.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from lorelei.algo.loss import LossResult, load_loss
from lorelei.lora.bank import AdapterBank
from lorelei.lora.sharded import is_sharded
from lorelei.lora.state import AdapterSnapshot, AdapterState, check_tensors, stable_seed
from lorelei.parallel.ranks import Ranks
from lorelei.train.adam import AdapterOptimizer
from lorelei.train.checks import (
    check_batch,
    check_losses,
    check_policy,
    check_snapshot,
    finite,
    under,
)
from lorelei.train.items import Outputs, item_rows, loss_items
from lorelei.train.layout import Piece, idle, micro_batches, packed, pieces, share
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


class Passes(Protocol):
    """The model of an engine, in this process alone or sharded over several."""

    @property
    def lockstep(self) -> bool:
        """Whether a pass takes all ranks at once, so that all must make as many."""
        ...

    def make_bank(self) -> AdapterBank[Any]:
        """An empty bank of adapters on the model."""
        ...

    def item_logprobs(
        self, batch: Batch, bank: AdapterBank[Any], dropout_seed: int | None
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities, with gradients to the bank's adapters, and entropies [I]."""
        ...

    def offload(self) -> None:
        """Free device memory until `onload`."""
        ...

    def onload(self) -> None:
        """Undo `offload`."""
        ...


class BankEngine:
    """Implements TrainEngine."""

    def __init__(self, passes: Passes, max_tokens_per_mb: int, ranks: Ranks) -> None:
        self._passes, self._max_tokens, self._ranks = passes, max_tokens_per_mb, ranks
        self._bank, self._held = passes.make_bank(), passes.make_bank()
        self._optimizers: dict[str, AdapterOptimizer] = {}

    def add_adapter(self, name: str, spec: AdapterSpec, seed: int = 0) -> None:
        adapter = self._bank.add(name, spec, seed)
        self._optimizers[name] = AdapterOptimizer(adapter.tensors())

    def drop_adapter(self, name: str) -> None:
        self._bank.drop(name)
        del self._optimizers[name]

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
        self._held.drop(policy)

    @torch.no_grad()
    def logprobs(self, batch: Batch, policy: Policy) -> ItemOutputs:
        check_batch(batch, self._bank)
        outputs = Outputs(len(batch.items), self._bank.dtype)
        bank = self._bank
        if policy != CURRENT:
            batch, bank = under(batch, policy), self._held
        if policy not in (CURRENT, BASE):
            bank[policy]
        with self._ranks.all_or_none():
            for part in self._micro_batches(batch):
                found = self._passes.item_logprobs(part.batch, bank, None)
                if self._ranks.is_leader:
                    outputs.put(part, *found)
        self._ranks.add_up([outputs.logprobs, outputs.entropy])
        return outputs.items()

    def forward_backward(self, batch: Batch, losses: Mapping[str, LossSpec]) -> TrainOutputs:
        try:
            return self._forward_backward(batch, losses)
        except BaseException:
            for name in self._optimizers.keys() & set(batch.adapters):
                self._optimizers[name].clear()
            raise

    def _forward_backward(self, batch: Batch, losses: Mapping[str, LossSpec]) -> TrainOutputs:
        check_batch(batch, self._bank)
        check_losses(batch, losses)
        outputs = Outputs(len(batch.items), self._bank.dtype)
        with self._ranks.all_or_none():
            for part in self._micro_batches(batch):
                self._micro_step(part, losses, outputs)
        self._ranks.add_up([outputs.logprobs, outputs.entropy])
        sums = self._ranks.add_up_dicts(outputs.sums)
        return TrainOutputs(
            items=outputs.items(),
            loss={name: sums.get(name, {}).get("loss", 0.0) for name in batch.adapters},
            metrics={name: sums.get(name, {}) for name in batch.adapters},
        )

    def _micro_step(self, part: Piece, losses: Mapping[str, LossSpec], outputs: Outputs) -> None:
        steps = (self._optimizers[name].step_count for name in part.batch.adapters)
        # other micro-batches and ranks draw other masks
        seed = stable_seed(*steps, *part.items[:1])
        logprobs_I, entropy_I = self._passes.item_logprobs(part.batch, self._bank, seed)
        with self._agreed():
            results = _losses(part, losses, logprobs_I)
        if not results:  # a pass that others need
            (logprobs_I.sum() * 0).backward()
            return
        torch.stack([result.total for result in results.values()]).sum().backward()
        if self._ranks.is_leader:
            outputs.put(part, logprobs_I.detach(), entropy_I)
            for name, result in results.items():
                outputs.add(name, result)

    def _agreed(self) -> AbstractContextManager[None]:
        """Losses may raise; before a backward pass that takes all ranks, all must know."""
        return self._ranks.all_or_none() if self._passes.lockstep else nullcontext()

    def _micro_batches(self, batch: Batch) -> list[Piece]:
        """This rank's, with empty ones behind them where others have more and wait for it."""
        if self._ranks.shares == 1:
            return micro_batches(batch, self._max_tokens)
        shares = share(pieces(batch, self._max_tokens), self._ranks.shares)
        mine = packed(shares[self._ranks.share], self._max_tokens)
        if self._passes.lockstep:
            most = max(len(packed(theirs, self._max_tokens)) for theirs in shares)
            mine += [idle(batch)] * (most - len(mine))
        return mine

    def optim_step(self, hyper: Mapping[str, AdamHyper]) -> Mapping[str, OptimStats]:
        tensors = [self._bank[name].tensors().values() for name in hyper]
        for one in tensors:
            # FSDP has added up those of what it shards
            self._ranks.add_up_gradients([t for t in one if not is_sharded(t)])
        norms = {name: self._optimizers[name].grad_norm() for name in hyper}
        try:
            ready = {name: finite(name, norm) for name, norm in norms.items()}
        except ValueError:
            for name in hyper:
                self._optimizers[name].clear()
            raise
        return {name: self._optimizers[name].step(h, ready[name]) for name, h in hyper.items()}

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
        shapes = {n: tuple(t.shape) for n, t in self._bank[name].tensors().items()}
        for tensors in (snapshot.state.tensors, snapshot.exp_avg, snapshot.exp_avg_sq):
            check_tensors(name, shapes, tensors)
        self._bank.load(name, snapshot.state.tensors)
        self._optimizers[name].restore(snapshot.exp_avg, snapshot.exp_avg_sq, snapshot.step)

    def offload(self) -> None:
        self._passes.offload()

    def onload(self) -> None:
        self._passes.onload()

    def close(self) -> None:
        self._optimizers.clear()


def _losses(
    part: Piece, losses: Mapping[str, LossSpec], logprobs_I: Tensor
) -> dict[str, LossResult]:
    found: dict[str, LossResult] = {}
    if len(part.items):
        for name, rows in item_rows(part.batch).items():
            items = loss_items(part.batch.items, rows, logprobs_I)
            spec = losses[name]
            found[name] = load_loss(spec)(logprobs_I[rows], items, **spec.params)
    return found
