"""ArchonEngine: the torch-native train engine, alone or as one of several data-parallel ranks.

A batch is cut into micro-batches of whole trees; tokens of several adapters share a micro-batch.
Shapes: T tokens, I items, D hidden.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lorelei.algo.loss import LossItems, LossResult, load_loss
from lorelei.lora.bank import AdapterBank, RoutedModel, check_tensors, stable_seed
from lorelei.lora.state import AdapterSnapshot, AdapterState
from lorelei.model.attention import PackedAttention, tree_blocks
from lorelei.model.decoder import Decoder
from lorelei.model.head import routed_target_logprobs, target_logprobs
from lorelei.train.adam import AdapterOptimizer
from lorelei.train.layout import Piece, join, micro_batches, pieces, share
from lorelei.train.ranks import Ranks
from lorelei.types import (
    AdamHyper,
    AdapterSpec,
    Batch,
    ItemOutputs,
    Items,
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
        outputs = _Outputs(len(batch.items), self._bank.dtype)
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
        if missing := sorted(set(batch.adapters) - losses.keys()):
            raise ValueError(f"losses: none given for adapter {missing[0]!r}, which has segments")
        outputs = _Outputs(len(batch.items), self._bank.dtype)
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

    def _micro_step(self, part: Piece, losses: Mapping[str, LossSpec], outputs: _Outputs) -> None:
        steps = (self._optimizers[name].step_count for name in part.batch.adapters)
        seed = stable_seed(*steps, part.items[0])  # other micro-batches and ranks draw other masks
        model = self._model(part.batch, "current", dropout_seed=seed)
        logprobs_I, entropy_I = self._item_logprobs(part.batch, model)
        totals: list[Tensor] = []
        for name, rows in _item_rows(part.batch).items():
            items = _loss_items(part.batch.items, rows, logprobs_I)
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
            ready = {name: _finite(name, norm) for name, norm in norms.items()}
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
        theirs, own = snapshot.state.spec, self._bank[name].spec
        if theirs.full != own.full:
            there, here = (f"lora.use_lora: {str(not s.full).lower()}" for s in (theirs, own))
            raise ValueError(
                f"adapter {name!r}: the snapshot is of {there}, the engine trains {here}; what a "
                "run trains cannot change, start a new one"
            )
        if theirs != own:
            raise ValueError(
                f"adapter {name!r}: the snapshot is of {theirs}, the engine holds {own}"
            )
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


class _Outputs:
    """Collects micro-batches into arrays of the whole batch and sums by adapter."""

    def __init__(self, items: int, dtype: torch.dtype) -> None:
        self.logprobs = torch.zeros(items, dtype=dtype)
        self.entropy = torch.zeros(items, dtype=dtype)
        self.sums: dict[str, dict[str, float]] = {}

    def put(self, part: Piece, logprobs_I: Tensor, entropy_I: Tensor) -> None:
        at = torch.from_numpy(part.items)
        self.logprobs[at] = logprobs_I.to("cpu", self.logprobs.dtype)
        self.entropy[at] = entropy_I.to("cpu", self.entropy.dtype)

    def add(self, name: str, result: LossResult) -> None:
        sums = self.sums.setdefault(name, {})
        for key, value in {"loss": result.total.detach(), **result.metrics}.items():
            sums[key] = sums.get(key, 0.0) + float(value)

    def items(self) -> ItemOutputs:
        # numpy keeps the engine's precision: fp64 engines are for parity tests
        return ItemOutputs(logprobs=self.logprobs.numpy(), entropy=self.entropy.numpy())


def _finite(name: str, norm: Tensor | None) -> Tensor:
    if norm is None:
        raise ValueError(f"adapter {name!r}: there are no gradients; call forward_backward first")
    if not torch.isfinite(norm):
        raise ValueError(f"adapter {name!r}: the gradient norm is {norm.item()}; no step was taken")
    return norm


def _item_rows(batch: Batch) -> dict[str, slice]:
    """{adapter: its items}; micro-batches are sorted by adapter, so they are one run."""
    bounds = np.cumsum([len(s.tokens) for s in batch.segments])
    owner_I = np.searchsorted(bounds, batch.items.source, side="right")
    names = batch.adapters
    adapter_I = np.array([names.index(s.adapter) for s in batch.segments])[owner_I]
    edges = np.flatnonzero(np.diff(adapter_I)) + 1
    starts = [0, *edges.tolist(), len(adapter_I)]
    return {
        names[int(adapter_I[start])]: slice(start, stop)
        for start, stop in itertools.pairwise(starts)
    }


def _loss_items(items: Items, rows: slice, like: Tensor) -> LossItems:
    def column(values: np.ndarray | None) -> Tensor | None:
        if values is None or np.isnan(values[rows]).all():  # another adapter's column
            return None
        return torch.from_numpy(values[rows]).to(like.device, like.dtype)

    weight, advantage, behaviour = map(column, (items.weight, items.advantage, items.behaviour))
    assert weight is not None and advantage is not None and behaviour is not None
    return LossItems(
        weight=weight,
        advantage=advantage,
        behaviour=behaviour,
        proximal=column(items.proximal),
        reference=column(items.reference),
        sequence=torch.from_numpy(items.sequence[rows]).to(like.device),
    )
