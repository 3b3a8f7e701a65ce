"""What every loss gets and gives, how items are weighed, and how a LossSpec becomes a function.

Losses are written with methods of tensors only: an algorithm's file holds its settings too, which
are read without torch. Shapes: I items of one adapter.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from lorelei.types import Floats, Longs, LossSpec
from lorelei.user_file import load_function

if TYPE_CHECKING:
    from torch import Tensor

Aggregation = Literal["token", "sequence"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossItems:
    """Aligned arrays [I] of one adapter's items in one micro-batch; no gradients."""

    weight: Tensor  # every normaliser: the loss is sum(weight * item loss)
    sequence: Tensor  # whole sequences are never split over micro-batches
    streams: Mapping[str, Tensor]  # by name; those that the loss's spec declares are there


@dataclass(frozen=True, slots=True, kw_only=True)
class LossResult:
    """The weighted sum to differentiate, and weighted sums to report."""

    total: Tensor
    metrics: Mapping[str, Tensor]


Loss = Callable[..., LossResult]  # (current_I with gradient, items, **params)


def load_loss(spec: LossSpec) -> Loss:
    """Import the function of a spec. Raises ValueError naming a path that leads nowhere."""
    module, _, name = spec.path.partition(":")
    if module.endswith(".py"):
        return load_function(spec.path, "loss")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"loss: {spec.path!r} is not 'package.module:function': {error}") from None


def loss_path(function: Loss) -> str:
    """What a LossSpec calls a function that stands at the top level of a module or a file."""
    module = importlib.import_module(function.__module__)
    file = Path(str(module.__file__))
    # a user's file is imported under a name that other processes do not know
    where = str(file) if function.__module__.startswith("lorelei_user_") else function.__module__
    return f"{where}:{function.__name__}"


def item_weights(sequence_I: Longs, aggregation: Aggregation) -> Floats:
    """Weights [I] of one optimizer step that sum to 1.

    token: every token counts the same (DAPO, arXiv 2503.14476); sequence: every sequence counts
    the same, its tokens share its weight (GRPO, arXiv 2402.03300).
    """
    if aggregation == "token":
        return np.full(len(sequence_I), 1.0 / max(len(sequence_I), 1), dtype=np.float32)
    _, inverse, lengths = np.unique(sequence_I, return_inverse=True, return_counts=True)
    return (1.0 / (lengths[inverse] * len(lengths))).astype(np.float32)


def kl_estimate(log_ratio: Tensor) -> Tensor:
    """k3, an unbiased, non-negative estimate of KL(p || q) at samples of p.

    log_ratio: log q - log p. Source: Schulman, 2020 (joschu.net/blog/kl-approx.html).
    """
    return log_ratio.expm1() - log_ratio
