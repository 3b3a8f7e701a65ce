"""ArchonEngine: the torch-native train engine, alone or as one of several data-parallel ranks.

A batch is cut into micro-batches of whole trees; tokens of several adapters share a micro-batch.
Shapes: T tokens, I items, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lorelei.algo.loss import load_loss
from lorelei.lora.bank import AdapterBank, RoutedModel
from lorelei.lora.fresh import stable_seed
from lorelei.lora.state import AdapterSnapshot, AdapterState, check_tensors
from lorelei.model.attention import PackedAttention, tree_blocks
from lorelei.model.decoder import Decoder
from lorelei.model.head import routed_target_logprobs, target_logprobs
from lorelei.train.adam import AdapterOptimizer
from lorelei.train.checks import check_losses, check_snapshot, finite
from lorelei.train.items import Outputs, item_rows, loss_items
from lorelei.train.layout import Piece, join, micro_batches, pieces, share
from lorelei.train.ranks import Ranks
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


class ArchonEngine:
    """Implements TrainEngine. Every rank gets every call with the same arguments."""

    def __init__(
        self,
        decoder: Decoder,
        max_tokens_per_mb: int = 1024,
        recompute: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self._bank, self._references = AdapterBank(decoder), AdapterBank(decoder)
        self._optimizers: dict[str, AdapterOptimizer] = {}
        self._max_tokens, self._recompute = max_tokens_per_mb, recompute
        self._ranks = ranks or Ranks.alone()

    def add_adapter(self, name: str, spec: AdapterSpec, seed: int = 0) -> None:
        adapter = self._bank.add(name, spec, seed)
        self._optimizers[name] = AdapterOptimizer(adapter.tensors())

    def drop_adapter(self, name: str) -> None:
        self._bank.drop(name)
        del self._optimizers[name]
        if name in self._references:
            self._references.drop(name)

    def set_reference(self, name: str, state: AdapterState | None) -> None:
        self._bank[name]
        if name in self._references:
            self._references.drop(name)
        if state is None:
            return
        self._references.add(name, state.spec)
        try:
            self._references.load(name, state.tensors)
        except ValueError:
            self._references.drop(name)
            raise

    @torch.no_grad()
    def logprobs(self, batch: Batch, policy: Policy) -> ItemOutputs:
        self._check(batch)
        outputs = Outputs(len(batch.items), self._bank.dtype)
        with self._ranks.together():
            for part in self._micro_batches(batch):
                model = self._model(part.batch, policy)
                outputs.put(part, *self._item_logprobs(part.batch, model))
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
        self._check(batch)
        check_losses(batch, losses)
        outputs = Outputs(len(batch.items), self._bank.dtype)
        with self._ranks.together():
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
        seed = stable_seed(*steps, part.items[0])  # other micro-batches and ranks draw other masks
        model = self._model(part.batch, "current", dropout_seed=seed)
        logprobs_I, entropy_I = self._item_logprobs(part.batch, model)
        totals: list[Tensor] = []
        for name, rows in item_rows(part.batch).items():
            items = loss_items(part.batch.items, rows, logprobs_I)
            spec = losses[name]
            result = load_loss(spec)(logprobs_I[rows], items, **spec.params)
            totals.append(result.total)
            outputs.add(name, result)
        torch.stack(totals).sum().backward()
        outputs.put(part, logprobs_I.detach(), entropy_I)

    def _item_logprobs(self, batch: Batch, model: RoutedModel) -> tuple[Tensor, Tensor]:
        decoder, route = model
        device, segments, items = decoder.device, batch.segments, batch.items
        tokens_T = np.concatenate([s.tokens for s in segments]).astype(np.int64)
        positions_T = np.concatenate(
            [np.arange(s.start, s.start + len(s.tokens)) for s in segments]
        )
        blocks = tree_blocks([len(s.tokens) for s in segments], [s.parent for s in segments])
        hidden_TD = decoder(
            torch.from_numpy(tokens_T).to(device),
            torch.from_numpy(positions_T).to(device),
            route,
            PackedAttention(blocks),
            self._recompute,
        )
        hidden_ID = hidden_TD[torch.from_numpy(items.source).to(device)]
        target_I = torch.from_numpy(items.target).to(device)
        temperature_I = torch.from_numpy(items.temperature).to(device)
        head = decoder.head
        if route.adapts(head):
            head_route = route.take(torch.from_numpy(items.source))
            return routed_target_logprobs(hidden_ID, head, head_route, target_I, temperature_I)
        return target_logprobs(hidden_ID, head, target_I, temperature_I)

    def _model(self, batch: Batch, policy: Policy, dropout_seed: int | None = None) -> RoutedModel:
        bank = self._references if policy == "reference" else self._bank
        spans = [(s.adapter if s.adapter in bank else None, len(s.tokens)) for s in batch.segments]
        return bank.model(spans, dropout_seed)

    def _micro_batches(self, batch: Batch) -> list[Piece]:
        if self._ranks.size == 1:
            return micro_batches(batch, self._max_tokens)
        mine = share(pieces(batch, self._max_tokens), self._ranks.size)[self._ranks.rank]
        if not mine:
            return []
        joined = join(mine)
        local = micro_batches(joined.batch, self._max_tokens)
        return [Piece(batch=p.batch, items=joined.items[p.items]) for p in local]

    def optim_step(self, hyper: Mapping[str, AdamHyper]) -> Mapping[str, OptimStats]:
        tensors = [self._bank[name].tensors().values() for name in hyper]
        for one in tensors:
            self._ranks.add_up_gradients(one)
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
        """Nothing to free: on the CPU memory is one, on an accelerator adapters are small."""

    def onload(self) -> None:
        """Nothing to bring back."""

    def close(self) -> None:
        self._optimizers.clear()

    def _check(self, batch: Batch) -> None:
        for name in batch.adapters:
            self._bank[name]
        if not len(batch.items):
            raise ValueError("batch: it has no items, so there is nothing to compute")
