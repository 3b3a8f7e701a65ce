"""MegatronEngine: one rank of a train engine on Megatron-Core.

A micro-batch holds rows of one adapter; adapters of a batch are trained one after another on the
one model, each with tensors and an optimizer of its own.
Shapes: I items.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path

import torch
from megatron.core import parallel_state
from torch import Tensor

from lorelei.algo.loss import load_loss
from lorelei.lora.state import AdapterSnapshot, AdapterState, stable_seed
from lorelei.lora.targets import module_shapes
from lorelei.model.config import DecoderConfig
from lorelei.model.load import read_config
from lorelei.parallel.ranks import Ranks
from lorelei.train.checks import (
    check_batch,
    check_losses,
    check_policy,
    check_snapshot,
    finite,
)
from lorelei.train.items import Outputs, loss_items
from lorelei.train.layout import packed, pieces, share
from lorelei.train.megatron.adapter import Adapter, Shard
from lorelei.train.megatron.collect import collect
from lorelei.train.megatron.model import build_model
from lorelei.train.megatron.pipeline import Pipeline
from lorelei.train.megatron.row import Row, make_row, padding_row
from lorelei.train.megatron.slots import Slots
from lorelei.train.moving import HOST, move
from lorelei.train.remote.spec import MegatronSpec
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


class MegatronEngine:
    """Implements TrainEngine. Every rank gets every call; the first one's results are whole."""

    def __init__(self, spec: MegatronSpec, ranks: Ranks) -> None:
        """Build this rank's part of the model. Raises ValueError for one that cannot be."""
        hf_config = read_config(Path(spec.model))
        config = DecoderConfig.from_hf(hf_config)
        self._model, self._layout = build_model(spec, config)
        self._ranks = ranks
        self._max_tokens = spec.max_tokens_per_mb
        self._pipeline = Pipeline(self._model, config, self._layout, spec.recompute)
        self._slots, self._held = (
            Slots(
                self._pipeline.sites,
                module_shapes(hf_config),
                config.architecture,
                self._layout,
                self._pipeline.device,
                distributed,
            )
            for distributed in (spec.distributed_optimizer, False)
        )

    def add_adapter(self, name: str, spec: AdapterSpec, seed: int = 0) -> None:
        self._slots.add(name, spec, seed)

    def drop_adapter(self, name: str) -> None:
        self._slots.drop(name)

    def hold(self, policy: Policy, state: AdapterState) -> None:
        check_policy(policy)
        if policy in self._held:
            self._held.drop(policy)
        self._held.add(policy, state.spec, 0)
        try:
            self._held.load(policy, state)
        except ValueError:
            self._held.drop(policy)
            raise

    def release(self, policy: Policy) -> None:
        self._held.drop(policy)

    def logprobs(self, batch: Batch, policy: Policy) -> ItemOutputs:
        check_batch(batch, self._slots)
        outputs = Outputs(len(batch.items), torch.float32)

        def judge(row: Row, logprobs_I: Tensor, entropy_I: Tensor) -> Tensor:
            if self._layout.reports_outputs and row.piece is not None:
                outputs.put(row.piece, logprobs_I, entropy_I)
            return logprobs_I.sum()

        with self._ranks.all_or_none():
            self._pipeline.forward(list(self._rows(batch, policy)), judge)
        self._ranks.add_up([outputs.logprobs, outputs.entropy])
        return outputs.items()

    def forward_backward(self, batch: Batch, losses: Mapping[str, LossSpec]) -> TrainOutputs:
        try:
            return self._forward_backward(batch, losses)
        except BaseException:
            self._slots.clear(batch.adapters)
            raise

    def _forward_backward(self, batch: Batch, losses: Mapping[str, LossSpec]) -> TrainOutputs:
        check_batch(batch, self._slots)
        check_losses(batch, losses)
        outputs = Outputs(len(batch.items), torch.float32)

        def judge(row: Row, logprobs_I: Tensor, entropy_I: Tensor) -> Tensor:
            assert row.piece is not None
            (name,) = row.piece.batch.adapters
            items = loss_items(row.piece.batch.items, slice(None), logprobs_I)
            result = load_loss(losses[name])(logprobs_I, items, **losses[name].params)
            if self._layout.reports_outputs:
                outputs.put(row.piece, logprobs_I.detach(), entropy_I)
                outputs.add(name, result)
            return result.total

        with self._ranks.all_or_none():
            self._pipeline.forward_backward(list(self._rows(batch, CURRENT, True)), judge)
        self._ranks.add_up([outputs.logprobs, outputs.entropy])
        sums = self._ranks.add_up_dicts(outputs.sums)
        for name in batch.adapters:
            self._slots[name].has_gradients = True
        return TrainOutputs(
            items=outputs.items(),
            loss={name: sums.get(name, {}).get("loss", 0.0) for name in batch.adapters},
            metrics={name: sums.get(name, {}) for name in batch.adapters},
        )

    def _rows(self, batch: Batch, policy: Policy, dropout: bool = False) -> Iterator[Row]:
        """This rank's rows; those of one adapter stand together.

        Where ranks meet within a layer all have as many rows of each adapter: experts apply the
        adapter of their own rank's row to the tokens of others.
        """
        data, device = self._layout.data, self._pipeline.device
        parts = pieces(batch, self._max_tokens)
        for name, group in groupby(parts, key=lambda p: p.batch.segments[0].adapter):
            shares = [packed(own, self._max_tokens) for own in share(list(group), data.size)]
            adapter = self._adapter(name, policy)
            steps = self._slots[name].optimizer.step_count
            for piece in shares[data.rank]:
                # other micro-batches and ranks draw other masks
                seed = stable_seed(steps, piece.items[0]) if dropout else None
                yield make_row(piece, adapter, seed, self._layout, device)
            if self._layout.experts_span_ranks:
                missing = max(map(len, shares)) - len(shares[data.rank])
                yield from (padding_row(adapter, self._layout, device) for _ in range(missing))

    def _adapter(self, name: str, policy: Policy) -> Adapter | None:
        if policy == CURRENT:
            return self._slots[name].adapter
        return None if policy == BASE else self._held[policy].adapter

    def optim_step(self, hyper: Mapping[str, AdamHyper]) -> Mapping[str, OptimStats]:
        slots = {name: self._slots[name] for name in hyper}
        try:
            norms = {
                name: finite(name, self._norm(name) if slot.has_gradients else None)
                for name, slot in slots.items()
            }
            return {n: slots[n].optimizer.step(h, norms[n]) for n, h in hyper.items()}
        finally:
            self._slots.clear(slots)

    def _norm(self, name: str) -> Tensor:
        return self._slots[name].optimizer.take_gradients(self._pipeline.device)

    def adapter_state(self, name: str) -> AdapterState:
        adapter = self._slots[name].adapter
        tensors = self._full({s: s.tensor for s in adapter.shards})
        return AdapterState(spec=adapter.spec, tensors=tensors)

    def snapshot(self, name: str) -> AdapterSnapshot:
        optimizer = self._slots[name].optimizer
        state = self.adapter_state(name)
        exp_avg, exp_avg_sq = (self._full(moments) for moments in optimizer.moments())
        return AdapterSnapshot(
            state=state, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, step=optimizer.step_count
        )

    def _full(self, shards: Mapping[Shard, Tensor]) -> dict[str, Tensor]:
        """Full tensors on the first rank, none on the others."""
        return collect(shards, self._layout, self._ranks) or {}

    def restore(self, name: str, snapshot: AdapterSnapshot) -> None:
        slot = self._slots[name]
        check_snapshot(name, slot.adapter.spec, snapshot)
        slot.check(name, snapshot)
        slot.optimizer.restore(
            snapshot.state.tensors, snapshot.exp_avg, snapshot.exp_avg_sq, snapshot.step
        )
        slot.has_gradients = False

    def offload(self) -> None:
        parallel_state.get_global_memory_buffer().buffer.clear()  # the core's, of activations
        move(self._model, HOST)

    def onload(self) -> None:
        move(self._model, self._pipeline.device)

    def close(self) -> None:
        """Nothing to stop: a worker's process ends."""
