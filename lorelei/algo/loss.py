"""What every loss gets and gives, how items are weighed, and how a LossSpec becomes a function.

Losses are written with methods of tensors only: an algorithm's file holds its settings too, which
are read without torch. Shapes: I items of one adapter.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lorelei.types import Floats, Longs, LossSpec
from lorelei.user_file import load_function

if TYPE_CHECKING:
    from torch import Tensor

Aggregation = Literal["token", "sequence", "constant"]
Estimator = Literal["k1", "k2", "k3"]


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


def item_weights(sequence_I: Longs, aggregation: Aggregation, length: int | None = None) -> Floats:
    """Weights [I] of one optimizer step.

    token: every token counts the same (DAPO, arXiv 2503.14476); sequence: every sequence counts
    the same, its tokens share its weight (GRPO, arXiv 2402.03300); both sum to 1. constant: a
    token's weight does not depend on how many tokens there are, a sequence of `length` tokens has
    one sequence's share (Dr. GRPO, arXiv 2503.20783).
    """
    if aggregation == "token":
        return np.full(len(sequence_I), 1.0 / max(len(sequence_I), 1), dtype=np.float32)
    _, inverse, lengths = np.unique(sequence_I, return_inverse=True, return_counts=True)
    if aggregation == "constant":
        assert length is not None, "the job knows rollout.max_new_tokens"
        return np.full(len(sequence_I), 1.0 / (length * len(lengths)), dtype=np.float32)
    return (1.0 / (lengths[inverse] * len(lengths))).astype(np.float32)


def kl_estimate(log_ratio: Tensor, estimator: Estimator = "k3") -> Tensor:
    """An estimate of KL(p || q) at samples of p; k3 is unbiased and non-negative.

    log_ratio: log q - log p. Source: Schulman, 2020 (joschu.net/blog/kl-approx.html).
    """
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio * log_ratio / 2
    return log_ratio.expm1() - log_ratio


def sequence_sum(values_I: Tensor, sequence_I: Tensor) -> Tensor:
    """[I] of every item, the sum over the items of its sequence."""
    place_I = _places(sequence_I)
    # float64: on a GPU the order of the additions differs from call to call
    sums = values_I.new_zeros(len(values_I)).double().index_add(0, place_I, values_I.double())
    return sums[place_I].to(values_I.dtype)


def sequence_mean(values_I: Tensor, sequence_I: Tensor, kept_I: Tensor | None = None) -> Tensor:
    """[I] of every item, the mean over the items of its sequence, or those of them that are kept.

    Of a sequence of which nothing is kept: 0.
    """
    kept = values_I.new_ones(len(values_I)) if kept_I is None else kept_I.to(values_I.dtype)
    counts = sequence_sum(kept, sequence_I).clamp(min=1)
    return sequence_sum(values_I * kept, sequence_I) / counts


def sequence_max(values_I: Tensor, sequence_I: Tensor) -> Tensor:
    """[I] of every item, the largest value of its sequence."""
    place_I = _places(sequence_I)
    lowest = values_I.new_full((len(values_I),), float("-inf"))
    return lowest.scatter_reduce(0, place_I, values_I, "amax")[place_I]


def _places(sequence_I: Tensor) -> Tensor:
    """[I] the place of every item's sequence among those there are."""
    untyped: Any = sequence_I
    return untyped.unique(return_inverse=True)[1]
