"""FsdpEngine: one rank of a train engine on a model of transformers that all ranks hold together.

The base is sharded over data- and sequence-parallel ranks (FSDP2) and cut over tensor-parallel
ones. Adapters are whole on every rank, with their optimizer: they are small, their gradients are
added up once a step, and every rank then takes the same step.

Shapes: T tokens, t of this rank, I items, i of this rank.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorelei.lora.bank import AdapterBank
from lorelei.model.backend import DTYPES
from lorelei.model.config import UnsupportedModel
from lorelei.parallel.collectives import summed
from lorelei.parallel.mesh import Mesh
from lorelei.parallel.ranks import Ranks
from lorelei.process import give_large_blocks_back
from lorelei.train.bank_engine import BankEngine
from lorelei.train.flat import blocks, item_tensors, spans, token_tensors
from lorelei.train.fsdp.attention import Attend
from lorelei.train.fsdp.full import HostedWeights
from lorelei.train.fsdp.model import HostedModel, Source
from lorelei.train.remote.spec import FsdpSpec
from lorelei.types import Batch, Segment


class FsdpEngine(BankEngine):
    """A BankEngine on a HostedModel. The default process group is the mesh."""

    def __init__(self, spec: FsdpSpec, device: torch.device, world: Ranks) -> None:
        """Raises UnsupportedModel or CheckpointError with one clear line."""
        mesh = Mesh.joined(
            device, spec.sequence_parallel, spec.tensor_parallel, offloaded=spec.cpu_offload
        )
        ranks = replace(world, team=spec.sequence_parallel * spec.tensor_parallel)
        super().__init__(_HostedPasses(spec, device, mesh, ranks), spec.max_tokens_per_mb, ranks)


class _HostedPasses:
    """Implements Passes."""

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
        self.lockstep = ranks.size > 1
        heads = self._model.lm.config.num_attention_heads
        if heads % mesh.sequence.size:
            raise UnsupportedModel(
                f"train.sequence_parallel: {mesh.sequence.size} does not divide the {heads} "
                "attention heads of the model; use a number that does, or train.data_parallel"
            )

    def make_bank(self) -> AdapterBank[HostedModel]:
        return AdapterBank(self._model, HostedWeights.copy_of)

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
        return self._whole(logprobs_i, here_I), self._whole(entropy_i, here_I)

    def _whole(self, values_i: Tensor, here_I: Tensor) -> Tensor:
        """[I]: those of the other processes of the sequence too."""
        if self._sequence.size == 1:
            return values_i
        zeros_I = values_i.new_zeros(len(here_I))
        return summed(zeros_I.masked_scatter(here_I, values_i), self._sequence)

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
