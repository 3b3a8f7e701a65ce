"""One micro-batch as Megatron gets it: a row of tokens, and everything that belongs to it.

Megatron hands its `packed_seq_params` to every layer, in the recomputed forward pass too, so the
row is an argument there; linear layers, which get nothing but x, find it in `Bound`.
Shapes: T tokens of the row, padding included; I items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from lorelei.model.attention import PackedAttention, tree_blocks
from lorelei.train.layout import Piece
from lorelei.train.megatron.adapter import Adapter
from lorelei.types import Segment


@dataclass(kw_only=True, eq=False)
class Row(PackedSeqParams):
    """Segments of one adapter, or of none, side by side."""

    piece: Piece | None  # none: a row that only keeps other ranks company
    adapter: Adapter | None
    dropout_seed: int | None
    tokens_T: Tensor
    positions_T: Tensor
    attention: PackedAttention
    source_I: Tensor
    target_I: Tensor
    temperature_I: Tensor


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
    piece: Piece,
    adapter: Adapter | None,
    dropout_seed: int | None,
    multiple: int,
    device: torch.device,
) -> Row:
    """The row of a piece, of a length that `multiple` divides."""
    segments, items = piece.batch.segments, piece.batch.items
    tokens, positions = _columns(segments)
    lengths, parents = [len(s.tokens) for s in segments], [s.parent for s in segments]
    if padding := -len(tokens) % multiple:
        tokens = np.concatenate([tokens, np.zeros(padding, dtype=np.int64)])
        positions = np.concatenate([positions, np.arange(padding)])
        lengths, parents = [*lengths, padding], [*parents, -1]
    return Row(
        piece=piece,
        adapter=adapter,
        dropout_seed=dropout_seed,
        tokens_T=torch.from_numpy(tokens).to(device),
        positions_T=torch.from_numpy(positions).to(device),
        attention=PackedAttention(tree_blocks(lengths, parents)),
        source_I=torch.from_numpy(items.source).to(device),
        target_I=torch.from_numpy(items.target).to(device, torch.int64),
        temperature_I=torch.from_numpy(items.temperature).to(device),
    )


def company_row(multiple: int, device: torch.device) -> Row:
    """A row of nothing but padding, whose loss is zero."""
    zeros = torch.zeros(multiple, dtype=torch.int64, device=device)
    return Row(
        piece=None,
        adapter=None,
        dropout_seed=None,
        tokens_T=zeros,
        positions_T=torch.arange(multiple, device=device),
        attention=PackedAttention(tree_blocks([multiple], [-1])),
        source_I=zeros[:1],
        target_I=zeros[:1],
        temperature_I=torch.ones(1, device=device),
    )


def _columns(segments: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and positions [T]."""
    tokens = np.concatenate([s.tokens for s in segments]).astype(np.int64)
    positions = np.concatenate([np.arange(s.start, s.start + len(s.tokens)) for s in segments])
    return tokens, positions
