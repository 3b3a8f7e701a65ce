"""A batch as the flat rows that a model reads.

Shapes: T tokens, I items.
"""

from __future__ import annotations

from collections.abc import Container

import numpy as np
import torch
from torch import Tensor

from lorelei.model.attention import Block, tree_blocks
from lorelei.types import Batch, Items


def token_tensors(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and their positions in their sequences, [T] each."""
    segments = batch.segments
    tokens_T = np.concatenate([s.tokens for s in segments]).astype(np.int64)
    positions_T = np.concatenate([np.arange(s.start, s.start + len(s.tokens)) for s in segments])
    return torch.from_numpy(tokens_T).to(device), torch.from_numpy(positions_T).to(device)


def item_tensors(items: Items, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Source, target and temperature, [I] each."""
    columns = (items.source, items.target, items.temperature)
    source_I, target_I, temperature_I = (torch.from_numpy(c).to(device) for c in columns)
    return source_I, target_I, temperature_I


def blocks(batch: Batch) -> tuple[Block, ...]:
    """Which tokens look at which."""
    segments = batch.segments
    return tree_blocks([len(s.tokens) for s in segments], [s.parent for s in segments])


def spans(batch: Batch, known: Container[str]) -> list[tuple[str | None, int]]:
    """(adapter, number of tokens) of each segment; None for one that is not among `known`."""
    return [(s.adapter if s.adapter in known else None, len(s.tokens)) for s in batch.segments]
