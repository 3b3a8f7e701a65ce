"""Items of losses, in fp64, and parts of them.

Shapes: I items.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lorelei.algo.loss import LossItems


def some_items(seed: int = 0, count: int = 12) -> tuple[Tensor, LossItems]:
    """(current_I, items) whose ratios lie on both sides of the clip, with both signs of advantage.

    Sequences have three items each.
    """
    draw = torch.Generator().manual_seed(seed)

    def normal(scale: float = 1.0) -> Tensor:
        return torch.randn(count, generator=draw, dtype=torch.float64) * scale

    behaviour = normal() - 3
    items = LossItems(
        weight=normal().abs() / count,
        streams={
            "advantage": normal(),
            "behaviour": behaviour,
            "proximal": behaviour + normal(0.3),
            "reference": behaviour + normal(0.3),
        },
        sequence=torch.arange(count) // 3,
    )
    return behaviour + normal(0.4), items


def with_streams(items: LossItems, **streams: Tensor) -> LossItems:
    """The items with streams replaced or added."""
    return replace(items, streams={**items.streams, **streams})


def without(items: LossItems, *names: str) -> LossItems:
    """The items without some of their streams."""
    return replace(items, streams={k: v for k, v in items.streams.items() if k not in names})


def taken(items: LossItems, index: slice | Tensor) -> LossItems:
    """Some of the items."""
    streams = {name: values[index] for name, values in items.streams.items()}
    return LossItems(weight=items.weight[index], sequence=items.sequence[index], streams=streams)
