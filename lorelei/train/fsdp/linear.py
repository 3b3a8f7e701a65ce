"""A linear layer of transformers with our adapters, whole or as a part of a tensor-parallel one.

Shapes: T tokens, D inputs, O outputs, R rank; d and o of this process's part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from lorelei.lora.bank import BankRoute
from lorelei.lora.linear import LoraPart, lora_linear
from lorelei.model.backend import Weight
from lorelei.model.linear import FrozenLinear, Part
from lorelei.parallel.collectives import divided, gathered, spread, summed
from lorelei.parallel.mesh import Axis
from lorelei.train.fsdp.binding import Binding

# transformers' names, in the tensor-parallel plans of its configurations; the last two are ours,
# for layers whose module exchanges what they need
Style = Literal[
    "replicated",
    "colwise",
    "rowwise",
    "colwise_gather_output",
    "rowwise_split_input",
    "inner_colwise",
    "inner_rowwise",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Which part of a matrix [O, D] a process holds: rows [o0, o1), columns [d0, d1)."""

    style: Style
    axis: Axis
    o0: int
    o1: int
    d0: int
    d1: int

    @classmethod
    def of(cls, style: Style, axis: Axis, out: int, wide: int) -> Cut:
        """Raises ValueError (why) when it cannot be cut."""
        o0, o1, d0, d1 = 0, out, 0, wide
        if "colwise" in style:
            o0, o1 = _part(out, "outputs", axis)
        elif "rowwise" in style:
            d0, d1 = _part(wide, "inputs", axis)
        return cls(style=style, axis=axis, o0=o0, o1=o1, d0=d0, d1=d1)

    @property
    def by_columns(self) -> bool:
        """Whether products are parts of a sum."""
        return "rowwise" in self.style

    def enter(self, x: Tensor) -> Tensor:
        """What the layer is given -> what its part multiplies with."""
        if self.style in ("colwise", "colwise_gather_output"):
            return spread(x, self.axis)
        return divided(x, self.axis) if self.style == "rowwise_split_input" else x

    def leave(self, y: Tensor) -> Tensor:
        """The product of its part -> what the layer gives."""
        if self.style in ("rowwise", "rowwise_split_input"):
            return summed(y, self.axis)
        return gathered(y, self.axis) if self.style == "colwise_gather_output" else y

    def adapter(self, part: LoraPart) -> LoraPart:
        """What an adapter does in this part.

        Its gradients on all processes of the axis add up to the whole one: where all of them
        compute the same, one of them gives it.
        """
        a_RD, b_OR = part.a, part.b
        if self.style == "replicated":
            if self.axis.rank > 0:
                a_RD, b_OR = a_RD.detach(), b_OR.detach()
            return replace(part, a=a_RD, b=b_OR)
        if self.by_columns:
            a_RD = a_RD[:, self.d0 : self.d1]
        return replace(part, a=a_RD, b=b_OR[self.o0 : self.o1], o0=0, o1=self.o1 - self.o0)


def _part(length: int, what: str, axis: Axis) -> tuple[int, int]:
    if length % axis.size:
        raise ValueError(f"{length} {what} cannot be shared out to {axis.size} processes")
    return axis.part(length)


class HostedWeight(Weight):
    """The matrix of a HostedLinear: FSDP gathers it for each pass, so it is asked for anew."""

    def __init__(self, module: HostedLinear, shape: tuple[int, int]) -> None:
        self._module = module
        self.shape = shape  # of the whole matrix

    def product(self, x: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        return F.linear(x, self._module.weight, bias)

    def transposed_product(self, dy: Tensor) -> Tensor:
        return dy @ self._module.weight


class HostedLinear(nn.Module):
    """Stands where transformers had a linear layer."""

    weight: nn.Parameter  # [o, d]
    bias: nn.Parameter | None  # [o]

    def __init__(self, name: str, replaced: nn.Linear, cut: Cut, binding: Binding) -> None:
        super().__init__()
        held = replaced.weight
        shape = (cut.o1 - cut.o0, cut.d1 - cut.d0)
        self.weight = nn.Parameter(held.new_empty(shape), requires_grad=False)
        self.bias = None
        if replaced.bias is not None:
            self.bias = nn.Parameter(held.new_empty(shape[:1]), requires_grad=False)
        whole = (replaced.out_features, replaced.in_features)
        self.cut, self._binding = cut, binding
        self.in_features, self.out_features = whole[1], whole[0]
        self.layer = FrozenLinear((Part(name, 0, whole[0]),), HostedWeight(self, whole), None)

    def forward(self, x: Tensor) -> Tensor:
        y = self._product(self.cut.enter(x.reshape(-1, x.shape[-1])))
        if self.bias is not None and not self.cut.by_columns:
            y = y + self.bias
        y = self.cut.leave(y)
        if self.bias is not None and self.cut.by_columns:  # once, not in every part of the sum
            y = y + self.bias
        return y.view(*x.shape[:-1], y.shape[-1])

    def _product(self, x_TD: Tensor) -> Tensor:
        route = self._binding.route
        if not isinstance(route, BankRoute):  # the weights themselves are trained
            return F.linear(x_TD, self.weight)
        spans = tuple(
            replace(span, parts=tuple(map(self.cut.adapter, span.parts)))
            for span in route.spans(self.layer)
        )
        return lora_linear(self.layer, x_TD, spans)

    def place(self, parameter: str) -> tuple[tuple[int, ...], tuple[slice, ...]]:
        """The shape of the checkpoint's tensor, and which part of it a parameter is."""
        rows, columns = slice(self.cut.o0, self.cut.o1), slice(self.cut.d0, self.cut.d1)
        if parameter == "weight":
            return (self.out_features, self.in_features), (rows, columns)
        return (self.out_features,), (rows,)
