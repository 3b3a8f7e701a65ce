"""What every train engine refuses, in the same words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from lorelei.algo.loss import load_loss
from lorelei.lora.state import AdapterSnapshot
from lorelei.types import AdapterSpec, Batch, LossSpec


class Adapters(Protocol):
    """The adapters that an engine holds."""

    def __getitem__(self, name: str, /) -> object:
        """Raises KeyError, naming those there are."""
        ...


def check_batch(batch: Batch, held: Adapters) -> None:
    """Raises KeyError for an adapter that is not held, ValueError for a batch without items."""
    for name in batch.adapters:
        held[name]
    if not len(batch.items):
        raise ValueError("batch: it has no items, so there is nothing to compute")


def check_losses(batch: Batch, losses: Mapping[str, LossSpec]) -> None:
    """Raises ValueError for an adapter without a loss, or a loss that is nowhere."""
    if missing := sorted(set(batch.adapters) - losses.keys()):
        raise ValueError(f"losses: none given for adapter {missing[0]!r}, which has segments")
    for name in batch.adapters:
        load_loss(losses[name])


def finite(name: str, norm: Tensor | None) -> Tensor:
    """The norm of an adapter's gradients. Raises ValueError unless a step can be taken."""
    if norm is None:
        raise ValueError(f"adapter {name!r}: there are no gradients; call forward_backward first")
    if not torch.isfinite(norm):
        raise ValueError(f"adapter {name!r}: the gradient norm is {norm.item()}; no step was taken")
    return norm


def check_snapshot(name: str, own: AdapterSpec, snapshot: AdapterSnapshot) -> None:
    """Raises ValueError for a snapshot of an adapter of another shape."""
    theirs = snapshot.state.spec
    if theirs.full != own.full:
        there, here = (f"lora.use_lora: {str(not s.full).lower()}" for s in (theirs, own))
        raise ValueError(
            f"adapter {name!r}: the snapshot is of {there}, the engine trains {here}; what a "
            "run trains cannot change, start a new one"
        )
    if theirs != own:
        raise ValueError(f"adapter {name!r}: the snapshot is of {theirs}, the engine holds {own}")
