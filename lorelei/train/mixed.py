"""Micro-batches that mix adapters: what the engines on an AdapterBank share.

A batch is cut into micro-batches of whole trees; tokens of several adapters stand in one flat row.
Shapes: T tokens, I items.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from lorelei.lora.bank import AdapterBank
from lorelei.model.attention import Block, tree_blocks
from lorelei.parallel.ranks import Ranks
from lorelei.train.adapter_engine import LossOf
from lorelei.train.items import dropout_seed
from lorelei.train.layout import (
    Piece,
    micro_batches,
    packed,
    padding_piece,
    pieces,
    share,
    token_columns,
)
from lorelei.types import Batch, Items


class MixedModel(Protocol):
    """A model that takes a row of tokens of several adapters."""

    ranks: Ranks
    max_tokens: int  # of a micro-batch
    lockstep: bool  # whether a pass takes all ranks at once, so that all must make as many

    def item_logprobs(
        self, batch: Batch, bank: AdapterBank[Any], dropout_seed: int | None
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities, with gradients to the bank's adapters, and entropies [I]."""
        ...


def run_mixed(
    model: MixedModel,
    batch: Batch,
    bank: AdapterBank[Any],
    loss_of: LossOf,
    steps: Mapping[str, int] | None,
) -> None:
    """Implements adapter_engine.Passes.run."""
    trains = steps is not None
    with torch.set_grad_enabled(trains):
        for part in _own_pieces(model, batch):
            seed = dropout_seed(steps, part) if steps is not None else None
            logprobs_I, entropy_I = model.item_logprobs(part.batch, bank, seed)
            # a loss may raise; before a backward pass that takes all ranks, all must know
            with model.ranks.all_or_none() if trains and model.lockstep else nullcontext():
                # without items it is a pass that other ranks need
                nothing = not len(part.items)
                loss = logprobs_I.sum() * 0 if nothing else loss_of(part, logprobs_I, entropy_I)
            if trains:
                loss.backward()


def _own_pieces(model: MixedModel, batch: Batch) -> list[Piece]:
    """This rank's; padded to the largest number of any rank where they run in lockstep."""
    ranks, limit = model.ranks, model.max_tokens
    if ranks.shares == 1:
        return micro_batches(batch, limit)
    shares = share(pieces(batch, limit), ranks.shares)
    mine = packed(shares[ranks.share], limit)
    if model.lockstep:
        most = max(len(packed(theirs, limit)) for theirs in shares)
        mine += [padding_piece(batch)] * (most - len(mine))
    return mine


def token_tensors(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and their positions in their sequences, [T] each."""
    tokens_T, positions_T = token_columns(batch.segments)
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
