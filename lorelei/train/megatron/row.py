"""One micro-batch for Megatron: a row of tokens, and everything that belongs to it.

Megatron hands its `packed_seq_params` to every layer, in the recomputed forward pass too, so the
row is an argument there; linear layers, which get nothing but x, find it in `Bound`.
Shapes: T tokens of the row, padding included, t of them on this rank; i items predicted here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from lorelei.model.attention import PackedAttention, tree_blocks
from lorelei.train.layout import Piece, token_columns
from lorelei.train.megatron.adapter import Adapter
from lorelei.train.megatron.mesh import MegatronMesh


@dataclass(kw_only=True, eq=False)
class Row(PackedSeqParams):
    """Segments of one adapter, or of none, side by side."""

    piece: Piece | None  # None: a padding row, which keeps ranks in lockstep
    adapter: Adapter | None
    dropout_seed: int | None
    tokens_t: Tensor
    positions_t: Tensor
    attention: PackedAttention  # of the whole row
    here_i: Tensor  # which items of the piece these are
    source_i: Tensor
    target_i: Tensor
    temperature_i: Tensor


class Bound:
    """The row whose layers run now."""

    def __init__(self) -> None:
        self.row: Row | None = None

    def to_layer(self, layer: torch.nn.Module) -> None:
        """Have a transformer layer set it, whenever it runs."""
        layer.register_forward_pre_hook(self._enter, with_kwargs=True)

    def _enter(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.row = kwargs["packed_seq_params"]


def make_row(
    piece: Piece, adapter: Adapter | None, dropout_seed: int | None, mesh: MegatronMesh, device: Any
) -> Row:
    """This rank's part of the row of a piece."""
    segments, items = piece.batch.segments, piece.batch.items
    tokens, positions = token_columns(segments)
    lengths, parents = [len(s.tokens) for s in segments], [s.parent for s in segments]
    if padding := -len(tokens) % mesh.multiple:
        tokens = np.concatenate([tokens, np.zeros(padding, dtype=np.int64)])
        positions = np.concatenate([positions, np.arange(padding)])
        lengths, parents = [*lengths, padding], [*parents, -1]
    t = len(tokens) // mesh.context.size
    first = mesh.context.rank * t
    here = np.flatnonzero((items.source >= first) & (items.source < first + t))

    def on_device(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(device)

    return Row(
        piece=piece,
        adapter=adapter,
        dropout_seed=dropout_seed,
        tokens_t=on_device(tokens[first : first + t]),
        positions_t=on_device(positions[first : first + t]),
        attention=PackedAttention(tree_blocks(lengths, parents)),
        here_i=on_device(here),
        source_i=on_device(items.source[here] - first),
        target_i=on_device(items.target[here].astype(np.int64)),
        temperature_i=on_device(items.temperature[here]),
    )


def padding_row(adapter: Adapter | None, mesh: MegatronMesh, device: Any) -> Row:
    """A row of nothing but padding, whose loss is zero: it keeps ranks in lockstep."""
    t = mesh.multiple // mesh.context.size
    zeros = torch.zeros(t, dtype=torch.int64, device=device)
    return Row(
        piece=None,
        adapter=adapter,
        dropout_seed=None,
        tokens_t=zeros,
        positions_t=torch.arange(t, device=device),
        attention=PackedAttention(tree_blocks([mesh.multiple], [-1])),
        here_i=zeros[:1],
        source_i=zeros[:1],
        target_i=zeros[:1],
        temperature_i=torch.ones(1, device=device),
    )
