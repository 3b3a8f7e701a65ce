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
from lorelei.model.linear import FrozenLinear, Lift, lifted


@dataclass(frozen=True, slots=True)
class LowRank:
    """What an adapter adds to a layer: x @ a @ b."""

    a_DR: Tensor
    b_RO: Tensor  # scaled; one block on the diagonal for each part of the layer


def low_rank(adapter: Adapter, dtype: torch.dtype) -> dict[FrozenLinear, LowRank]:
    """Two matrices for each layer that the adapter acts on."""
    found: dict[FrozenLinear, LowRank] = {}
    for layer, parts in adapter.layers.items():
        a_DR, b_RO = side_by_side(layer, parts, adapter.spec.scale)
        found[layer] = LowRank(a_DR.to(dtype), b_RO.to(dtype))
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
        self._spans = tuple(spans)

    def __call__(self, layer: FrozenLinear, x_TD: Tensor, lift: Lift | None = None) -> Tensor:
        x_TD = lifted(x_TD, lift)
        y_TO = layer.product(x_TD)
        for span in self._spans:
            if (delta := span.layers.get(layer)) is not None:
                rows = slice(span.start, span.stop)
                y_TO[rows].addmm_(x_TD[rows] @ delta.a_DR, delta.b_RO)
        return y_TO

    def take(self, index: Tensor) -> PublishedRoute:
        chosen: list[int] = index.tolist()
        spans: list[RoutedSpan] = []
        for span in self._spans:
            start, stop = bisect_left(chosen, span.start), bisect_left(chosen, span.stop)
            if stop > start:
                spans.append(RoutedSpan(start, stop, span.layers))
        return PublishedRoute(spans)
