"""One rank of a train engine on Megatron-Core.

A micro-batch holds rows of one adapter; adapters of a batch are trained one after another on the
one model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path

from megatron.core import parallel_state

from lorelei.lora.targets import module_shapes
from lorelei.model.backend import HOST, move
from lorelei.model.config import DecoderConfig
from lorelei.model.load import read_config
from lorelei.parallel.ranks import Ranks
from lorelei.train.adapter_engine import AdapterEngine, LossOf
from lorelei.train.items import dropout_seed
from lorelei.train.layout import packed, pieces, share
from lorelei.train.megatron.bank import ShardedBank
from lorelei.train.megatron.kind import MegatronSpec
from lorelei.train.megatron.model import build_model
from lorelei.train.megatron.optimizer import ShardedOptimizer
from lorelei.train.megatron.pipeline import Pipeline
from lorelei.train.megatron.row import Row, make_row, padding_row
from lorelei.types import Batch


def megatron_engine(spec: MegatronSpec, ranks: Ranks) -> AdapterEngine[ShardedBank]:
    """Build this rank's part of the model. Raises ValueError for one that cannot be."""
    return AdapterEngine(_PipelinePasses(spec, ranks), ranks)


class _PipelinePasses:
    """Implements Passes."""

    def __init__(self, spec: MegatronSpec, ranks: Ranks) -> None:
        self._spec, self._hf_config = spec, read_config(Path(spec.model))
        config = DecoderConfig.from_hf(self._hf_config)
        self._architecture = config.architecture
        self._model, self._mesh = build_model(spec, config, ranks)
        self._pipeline = Pipeline(self._model, config, self._mesh, spec.recompute)
        self.reports_outputs = self._mesh.reports_outputs

    def make_bank(self) -> ShardedBank:
        return ShardedBank(
            self._pipeline.targets,
            module_shapes(self._hf_config),
            self._architecture,
            self._mesh,
            self._pipeline.device,
        )

    def make_optimizer(self, bank: ShardedBank, name: str) -> ShardedOptimizer:
        return ShardedOptimizer(
            bank[name].shards, self._mesh, self._spec.distributed_optimizer, self._pipeline.device
        )

    def run(
        self, batch: Batch, bank: ShardedBank, loss_of: LossOf, steps: Mapping[str, int] | None
    ) -> None:
        self._pipeline.run(list(self._rows(batch, bank, steps)), loss_of, trains=steps is not None)

    def _rows(
        self, batch: Batch, bank: ShardedBank, steps: Mapping[str, int] | None
    ) -> Iterator[Row]:
        """This rank's rows; those of one adapter stand together.

        Where experts span ranks, all have equally many rows of each adapter, in the same order:
        an expert applies the adapter of its own rank's row to the tokens that others send it.
        """
        data, device, limit = self._mesh.data, self._pipeline.device, self._spec.max_tokens_per_mb
        parts = pieces(batch, limit)
        for name, group in groupby(parts, key=lambda p: p.batch.segments[0].adapter):
            shares = [packed(own, limit) for own in share(list(group), data.size)]
            adapter = bank.get(name)
            for piece in shares[data.rank]:
                seed = dropout_seed(steps, piece) if steps is not None else None
                yield make_row(piece, adapter, seed, self._mesh, device)
            if self._mesh.experts_span_ranks:
                missing = max(map(len, shares)) - len(shares[data.rank])
                yield from (padding_row(adapter, self._mesh, device) for _ in range(missing))

    def offload(self) -> None:
        parallel_state.get_global_memory_buffer().buffer.clear()  # the core's, of activations
        move(self._model, HOST)

    def onload(self) -> None:
        move(self._model, self._pipeline.device)
