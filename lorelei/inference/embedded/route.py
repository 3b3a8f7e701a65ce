"""Applies published adapters: they never change, so what training computes each time is kept.

Shapes: T tokens, D inputs, O outputs, R rank (summed over the parts of a fused layer).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorelei.lora.bank import Adapter
from lorelei.lora.linear import side_by_side
from lorelei.model.backend import LowRank, Weight
from lorelei.model.linear import FrozenLinear, FusedInput, transformed


def low_rank(adapter: Adapter, dtype: torch.dtype) -> dict[FrozenLinear, LowRank]:
    """What the adapter adds to each layer that it acts on: x @ a @ b.

    b is scaled, and has one block on the diagonal for each part of the layer.
    """
    found: dict[FrozenLinear, LowRank] = {}
    for layer, parts in adapter.layers.items():
        a_DR, b_RO = side_by_side(layer, parts, adapter.spec.scale)
        found[layer] = LowRank.of(a_DR.to(dtype), b_RO.to(dtype))
    return found


@dataclass(frozen=True, slots=True)
class RoutedSpan:
    """Tokens [start, stop) go through these matrices."""

    start: int
    stop: int
    layers: Mapping[FrozenLinear, LowRank]


class PublishedRoute:
    """Tokens of several adapters, and of none, in one row. For inference: gives no gradients."""

    def __init__(self, spans: Sequence[RoutedSpan]) -> None:
        self.spans = tuple(spans)

    def weight(self, layer: FrozenLinear) -> Weight:
        """What a layer multiplies with, besides its adapters' matrices."""
        return layer.weight

    def __call__(
        self, layer: FrozenLinear, x_TD: Tensor, fused_input: FusedInput | None = None
    ) -> Tensor:
        x_TD = transformed(x_TD, fused_input)
        y_TO = layer.product(x_TD)
        for span in self.spans:
            if (delta := span.layers.get(layer)) is not None:
                rows = slice(span.start, span.stop)
                delta.add_to(y_TO[rows], x_TD[rows])
        return y_TO

    def take(self, index: Tensor) -> PublishedRoute:
        chosen: list[int] = index.tolist()
        spans: list[RoutedSpan] = []
        for span in self.spans:
            start, stop = bisect_left(chosen, span.start), bisect_left(chosen, span.stop)
            if stop > start:
                spans.append(RoutedSpan(start, stop, span.layers))
        return PublishedRoute(spans)
