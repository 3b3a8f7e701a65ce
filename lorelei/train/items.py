"""The items of a micro-batch as losses want them, and what a pass found out as the caller does.

Shapes: I items.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from lorelei.algo.loss import LossItems, LossResult
from lorelei.train.layout import Piece
from lorelei.types import Batch, Floats, ItemOutputs, Items


class Outputs:
    """Collects micro-batches into arrays of the whole batch and sums by adapter."""

    def __init__(self, items: int, dtype: torch.dtype) -> None:
        self.logprobs = torch.zeros(items, dtype=dtype)
        self.entropy = torch.zeros(items, dtype=dtype)
        self.sums: dict[str, dict[str, float]] = {}

    def put(self, part: Piece, logprobs_I: Tensor, entropy_I: Tensor) -> None:
        """The outputs of a micro-batch's items."""
        at = torch.from_numpy(part.items)
        self.logprobs[at] = logprobs_I.to("cpu", self.logprobs.dtype)
        self.entropy[at] = entropy_I.to("cpu", self.entropy.dtype)

    def add(self, name: str, result: LossResult) -> None:
        """An adapter's loss and metrics over a micro-batch."""
        sums = self.sums.setdefault(name, {})
        for key, value in {"loss": result.total.detach(), **result.metrics}.items():
            sums[key] = sums.get(key, 0.0) + float(value)

    def items(self) -> ItemOutputs:
        """What was put, in the batch's order."""
        # numpy keeps the engine's precision: fp64 engines are for parity tests
        return ItemOutputs(logprobs=self.logprobs.numpy(), entropy=self.entropy.numpy())


def item_rows(batch: Batch) -> dict[str, slice]:
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


def loss_items(items: Items, rows: slice, like: Tensor) -> LossItems:
    """One adapter's items as tensors like `like`; streams that are only others' are left out."""

    def column(values: Floats) -> Tensor:
        return torch.from_numpy(values[rows]).to(like.device, like.dtype)

    streams = {
        name: column(values)
        for name, values in items.streams.items()
        if not np.isnan(values[rows]).all()
    }
    return LossItems(
        weight=column(items.weight),
        sequence=torch.from_numpy(items.sequence[rows]).to(like.device),
        streams=streams,
    )
