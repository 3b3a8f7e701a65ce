"""The items of a micro-batch as losses read them, and the outputs of a pass as callers do.

Shapes: I items.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lorelei.algo.loss import LossItems, LossResult, load_loss
from lorelei.lora.state import stable_seed
from lorelei.parallel.ranks import Ranks
from lorelei.train.layout import Piece
from lorelei.types import Batch, Floats, ItemOutputs, Items, LossSpec


class Outputs:
    """Collects micro-batches into arrays of the whole batch and sums by adapter.

    What a micro-batch gives stays on its device until all have run: a copy would wait for it.
    """

    def __init__(self, items: int, dtype: torch.dtype) -> None:
        self._items, self._dtype = items, dtype
        self._outputs: list[tuple[Tensor, Tensor, Tensor]] = []  # which items, and their values
        self._results: list[tuple[str, Mapping[str, Tensor]]] = []

    def put(
        self,
        part: Piece,
        logprobs_I: Tensor,
        entropy_I: Tensor,
        results: Mapping[str, LossResult],
    ) -> None:
        """The outputs of a micro-batch's items, and the losses of its adapters."""
        at = torch.from_numpy(part.items)
        self._outputs.append((at, logprobs_I.detach(), entropy_I.detach()))
        for name, result in results.items():
            values = {"loss": result.total, **result.metrics}
            self._results.append((name, {key: value.detach() for key, value in values.items()}))

    def items(self, ranks: Ranks) -> ItemOutputs:
        """What was put on all ranks, in the batch's order."""
        logprobs_I, entropy_I = (torch.zeros(self._items, dtype=self._dtype) for _ in range(2))
        for at, logprobs, entropy in self._outputs:
            logprobs_I[at] = logprobs.to("cpu", self._dtype)
            entropy_I[at] = entropy.to("cpu", self._dtype)
        ranks.add_up([logprobs_I, entropy_I])
        # numpy keeps the engine's precision: fp64 engines are for parity tests
        return ItemOutputs(logprobs=logprobs_I.numpy(), entropy=entropy_I.numpy())

    def sums(self, ranks: Ranks) -> dict[str, dict[str, float]]:
        """Losses and metrics of all ranks, by adapter."""
        sums: dict[str, dict[str, float]] = {}
        for name, values in self._results:
            own = sums.setdefault(name, {})
            for key, value in values.items():
                own[key] = own.get(key, 0.0) + float(value)
        return ranks.add_up_dicts(sums)


def piece_losses(
    part: Piece, losses: Mapping[str, LossSpec], logprobs_I: Tensor
) -> dict[str, LossResult]:
    """The loss of each adapter with items in a micro-batch. Raises ValueError where one raises."""
    found: dict[str, LossResult] = {}
    for name, rows in item_rows(part.batch).items():
        items, spec = loss_items(part.batch.items, rows, logprobs_I), losses[name]
        try:
            found[name] = load_loss(spec)(logprobs_I[rows], items, **spec.params)
        # The border to the user's code.
        except Exception as error:
            text = f"adapter {name!r}: its loss raised {type(error).__name__}: {error}"
            raise ValueError(text) from error
    return found


def measured(items: Items, spec: LossSpec, logprobs_I: Floats) -> dict[str, float]:
    """The loss of one adapter's items, and what it reports, at log-probabilities that are there."""
    current_I = torch.from_numpy(logprobs_I)
    read = loss_items(items, slice(0, len(items)), current_I)
    result = load_loss(spec)(current_I, read, **spec.params)
    values = {"loss": result.total, **result.metrics}
    return {name: float(value) for name, value in values.items()}


def dropout_seed(steps: Mapping[str, int], part: Piece) -> int:
    """Of a micro-batch: others, and other ranks and steps, draw other masks."""
    return stable_seed(*(steps[name] for name in part.batch.adapters), *part.items[:1])


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
