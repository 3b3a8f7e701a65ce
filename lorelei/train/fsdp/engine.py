"""One rank of a train engine on a model of transformers that all ranks hold together.

The base is sharded over data- and sequence-parallel ranks (FSDP2) and cut over tensor-parallel
ones. Adapters are whole on every rank, with their optimizer: they are small, their gradients are
added up once a step, and every rank then takes the same step.

Shapes: T tokens, t of this rank, I items, i of this rank.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorelei.lora.bank import AdapterBank
from lorelei.model.backend import DTYPES
from lorelei.model.config import UnsupportedModel
from lorelei.parallel.mesh import Mesh
from lorelei.parallel.ranks import Ranks
from lorelei.parallel.ulysses import of_all_items
from lorelei.process import give_large_blocks_back
from lorelei.train.adam import AdapterOptimizer
from lorelei.train.adapter_engine import AdapterEngine
from lorelei.train.fsdp.attention import Attend
from lorelei.train.fsdp.full import hosted_copy
from lorelei.train.fsdp.kind import FsdpSpec
from lorelei.train.fsdp.model import HostedModel, Source
from lorelei.train.mixed import blocks, item_tensors, run_mixed, spans, token_tensors
from lorelei.types import Batch, Segment

HostedBank = AdapterBank[HostedModel]


def fsdp_engine(spec: FsdpSpec, device: torch.device, world: Ranks) -> AdapterEngine[HostedBank]:
    """The engine on a HostedModel. The default process group is the mesh.

    Raises UnsupportedModel or CheckpointError with one clear line.
    """
    mesh = Mesh.joined(
        device, spec.sequence_parallel, spec.tensor_parallel, offloaded=spec.cpu_offload
    )
    ranks = replace(world, group=spec.sequence_parallel * spec.tensor_parallel)
    return AdapterEngine(_HostedPasses(spec, device, mesh, ranks), ranks)


class _HostedPasses:
    """Implements Passes and MixedModel."""

    def __init__(self, spec: FsdpSpec, device: torch.device, mesh: Mesh, ranks: Ranks) -> None:
        source = Source(
            folder=Path(spec.model),
            dtype=DTYPES[spec.dtype],
            device=device,
            recompute=spec.recompute,
            cpu_offload=spec.cpu_offload,
        )
        if mesh.shards is not None and device.type == "cpu":
            give_large_blocks_back()  # weights are gathered and dropped all the time
        self._model = HostedModel(source, mesh)
        self._sequence = mesh.sequence
        self.max_tokens, self.ranks = spec.max_tokens_per_mb, ranks
        self.run = partial(run_mixed, self)
        self.lockstep, self.reports_outputs = ranks.size > 1, ranks.is_leader
        heads = self._model.lm.config.num_attention_heads
        if heads % mesh.sequence.size:
            raise UnsupportedModel(
                f"train.sequence_parallel: {mesh.sequence.size} does not divide the {heads} "
                "attention heads of the model; use a number that does, or train.data_parallel"
            )

    def make_bank(self) -> HostedBank:
        return AdapterBank(self._model, hosted_copy)

    def make_optimizer(self, bank: HostedBank, name: str) -> AdapterOptimizer:
        return AdapterOptimizer(bank[name].tensors(), self.ranks)

    def item_logprobs(
        self, batch: Batch, bank: AdapterBank[Any], dropout_seed: int | None
    ) -> tuple[Tensor, Tensor]:
        batch = _padded(batch, self._sequence.size)
        model, route = bank.model(spans(batch, bank), dropout_seed)
        model.settle()
        tokens_T, positions_T = token_tensors(batch, model.device)
        source_I, target_I, temperature_I = item_tensors(batch.items, model.device)
        start, stop = self._sequence.part(len(tokens_T))
        here_I = (source_I >= start) & (source_I < stop)
        if self._sequence.size > 1:
            route = route.take(torch.arange(start, stop))
        logprobs_i, entropy_i = model(
            tokens_T[start:stop],
            positions_T[start:stop],
            route,
            Attend(blocks(batch), self._sequence),
            (source_I[here_I] - start, target_I[here_I], temperature_I[here_I]),
        )
        here_i = here_I.nonzero()[:, 0]
        return of_all_items((logprobs_i, entropy_i), here_i, len(here_I), self._sequence)

    def offload(self) -> None:
        self._model.offload()

    def onload(self) -> None:
        self._model.onload()


def _padded(batch: Batch, size: int) -> Batch:
    """With a last segment from which nothing is predicted where `size` does not divide it."""
    lack = -sum(len(s.tokens) for s in batch.segments) % size
    if lack == 0:
        return batch
    whose = batch.segments[-1].adapter
    nothing = Segment(tokens=np.zeros(lack, dtype=np.int32), parent=-1, start=0, adapter=whose)
    return replace(batch, segments=(*batch.segments, nothing))
