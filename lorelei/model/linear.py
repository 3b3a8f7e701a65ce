"""A frozen linear layer. Several projections of the same input are one layer with named parts.

Shapes: T tokens, D inputs, O outputs of all parts together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lorelei.model.backend import Weight


@dataclass(frozen=True, slots=True)
class Part:
    """Output rows [start, stop) of a layer, by the module name of the checkpoint."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False)
class FrozenLinear:
    """y = x @ W.T + b; the route adds what adapters contribute."""

    parts: tuple[Part, ...]
    weight: Weight
    bias: Tensor | None

    @classmethod
    def fuse(cls, modules: dict[str, tuple[Tensor, Tensor | None]]) -> FrozenLinear:
        """One layer from {module name: (weight [O, D], bias [O] or None)} that share an input."""
        parts: list[Part] = []
        for name, (weight, _) in modules.items():
            start = parts[-1].stop if parts else 0
            parts.append(Part(name, start, start + weight.shape[0]))
        weights = [w for w, _ in modules.values()]
        biases = [b if b is not None else w.new_zeros(w.shape[0]) for w, b in modules.values()]
        has_bias = any(b is not None for _, b in modules.values())
        return cls(
            tuple(parts),
            Weight.of(torch.cat(weights) if len(weights) > 1 else weights[0]),
            torch.cat(biases) if has_bias else None,
        )

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    def product(self, x_TD: Tensor, out: Tensor | None = None) -> Tensor:
        """x [T, D] -> [T, O], without gradient; out: memory that it may be written to."""
        return self.weight.product(x_TD, self.bias, out)


class FusedInput(Protocol):
    """What a layer applies to its input first: a norm, a gate.

    Cheap to compute, so a backward pass computes it again and keeps only its input.
    """

    def __call__(self, x: Tensor) -> Tensor:
        """[T, D'] -> [T, D], without gradient."""
        ...

    def backward(self, x: Tensor, dy: Tensor) -> Tensor:
        """The gradient [T, D'] of the input from that of the output [T, D]."""
        ...


def transformed(x: Tensor, fused_input: FusedInput | None) -> Tensor:
    """x, or fused_input(x)."""
    return x if fused_input is None else fused_input(x)


class Route(Protocol):
    """Says which adapters act on which tokens, and applies a layer with them."""

    def __call__(
        self, layer: FrozenLinear, x_TD: Tensor, fused_input: FusedInput | None = None
    ) -> Tensor:
        """[T, D'] -> [T, O]: of fused_input(x), the frozen product plus each token's adapter's."""
        ...

    def take(self, index: Tensor) -> Route:
        """The route of the tokens at `index` (ascending)."""
        ...
