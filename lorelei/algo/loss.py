"""What every loss gets and gives, and how a LossSpec becomes a function.

Shapes: I items.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorelei.types import LossSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class LossItems:
    """Aligned arrays [I] of one adapter's items in one micro-batch; no gradients."""

    weight: Tensor  # every normaliser: the loss is sum(weight * item loss)
    advantage: Tensor
    behaviour: Tensor
    proximal: Tensor | None  # none: the policy has not moved since the start of the update
    reference: Tensor | None
    sequence: Tensor  # whole sequences are never split over micro-batches


@dataclass(frozen=True, slots=True, kw_only=True)
class LossResult:
    """The weighted sum to differentiate, and weighted sums to report."""

    total: Tensor
    metrics: Mapping[str, Tensor]


Loss = Callable[..., LossResult]  # (current_I with gradient, items, **params)


def load_loss(spec: LossSpec) -> Loss:
    """Import the function of a spec. Raises ValueError naming a path that leads nowhere."""
    module, _, name = spec.path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"loss: {spec.path!r} is not 'package.module:function': {error}") from None


def kl_estimate(log_ratio: Tensor) -> Tensor:
    """k3, an unbiased, non-negative estimate of KL(p || q) at samples of p.

    log_ratio: log q - log p. Source: Schulman, 2020 (joschu.net/blog/kl-approx.html).
    """
    return torch.expm1(log_ratio) - log_ratio
