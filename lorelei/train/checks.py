"""What every train engine refuses: one text for each error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from lorelei.algo.loss import load_loss
from lorelei.lora.state import AdapterSnapshot
from lorelei.types import BASE, CURRENT, AdapterSpec, Batch, LossSpec, Policy


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
    """Raises ValueError for an adapter without a loss, a loss that is nowhere, a lacking stream."""
    if missing := sorted(set(batch.adapters) - losses.keys()):
        raise ValueError(f"losses: none given for adapter {missing[0]!r}, which has segments")
    for name in batch.adapters:
        load_loss(losses[name])
        if lacking := [s for s in losses[name].streams if s not in batch.items.streams]:
            raise ValueError(
                f"losses: that of adapter {name!r} reads the stream {lacking[0]!r}, which the "
                f"batch does not have; it has: {', '.join(batch.items.streams) or 'none'}"
            )


def check_policy(policy: Policy) -> None:
    """Raises ValueError for a name that is taken."""
    if policy in (CURRENT, BASE):
        raise ValueError(f"policy: {policy!r} is reserved; give another name")


def check_held(policy: Policy, held: Iterable[str]) -> None:
    """Raises KeyError for a policy that is not held, naming those that are."""
    if policy not in (names := sorted(held)):
        raise KeyError(
            f"no policy {policy!r} is held; there are: {', '.join([CURRENT, BASE, *names])}"
        )


def under(batch: Batch, policy: Policy) -> Batch:
    """The batch with every segment under one frozen policy."""
    segments = tuple(replace(segment, adapter=policy) for segment in batch.segments)
    return replace(batch, segments=segments)


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
