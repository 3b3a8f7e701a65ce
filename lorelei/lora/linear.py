"""A frozen linear layer with the low-rank products of the adapters its tokens are routed to.

Shapes: T tokens, t tokens of one span, D inputs, O outputs, R rank (summed over a layer's parts).
Source: Hu et al., 2021 (arXiv 2106.09685).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lorelei.model.autograd import Function
from lorelei.model.backend import add_product
from lorelei.model.linear import FrozenLinear, FusedInput, Route, transformed


class ModelRoute(Route, Protocol):
    """A route that knows which layers it changes."""

    def adapts(self, layer: FrozenLinear) -> bool:
        """Whether any adapter of the row acts on this layer."""
        ...

    def take(self, index: Tensor) -> ModelRoute: ...


@dataclass(frozen=True, slots=True)
class LoraPart:
    """A [R, D] and B [o1 - o0, R] that add scale * x @ A.T @ B.T to outputs [o0, o1)."""

    name: str
    a: Tensor
    b: Tensor
    o0: int
    o1: int


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens [start, stop) of the row go through these parts."""

    start: int
    stop: int
    scale: float
    parts: tuple[LoraPart, ...]
    dropout: float
    dropout_seed: int

    def masked(self, x_tD: Tensor) -> Tensor:
        """x with dropout; the same mask every time, so a recomputed forward pass agrees."""
        return x_tD if self.dropout == 0 else x_tD * self.mask(x_tD)

    def mask(self, x_tD: Tensor) -> Tensor:
        """[t, D]: 0 with probability `dropout`, else 1 / (1 - dropout)."""
        return dropout_mask(x_tD, self.dropout, self.dropout_seed)


def dropout_mask(x: Tensor, dropout: float, seed: int) -> Tensor:
    """Like x: 0 with probability `dropout`, else 1 / (1 - dropout)."""
    generator = torch.Generator(x.device).manual_seed(seed)
    draw = torch.rand(x.shape, generator=generator, device=x.device)
    return (draw >= dropout).to(x.dtype) / (1 - dropout)


def side_by_side(
    layer: FrozenLinear, parts: tuple[LoraPart, ...], scale: float
) -> tuple[Tensor, Tensor]:
    """a [D, R] and b [R, O] with x @ a @ b what the parts add; b has a block for each part."""
    a_DR = torch.cat([part.a.detach() for part in parts]).T.contiguous()
    b_RO = a_DR.new_zeros(a_DR.shape[1], layer.weight.shape[0])
    r = 0
    for part in parts:
        rank = part.b.shape[1]
        b_RO[r : r + rank, part.o0 : part.o1] = part.b.detach().T * scale
        r += rank
    return a_DR, b_RO


def lora_linear(
    layer: FrozenLinear, x: Tensor, spans: tuple[Span, ...], fused_input: FusedInput | None = None
) -> Tensor:
    """x [T, D'] -> [T, O] of fused_input(x) [T, D]. The gradient reaches x, A and B, never W."""
    weights = [w for span in spans for part in span.parts for w in (part.a, part.b)]
    return _LoraLinear.apply(x, layer, spans, fused_input, *weights)


class _LoraLinear(Function):
    """Keeps x and fused_input(x) @ A.T; fused_input(x) and the product with W are not kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layer: FrozenLinear,
        spans: tuple[Span, ...],
        fused_input: FusedInput | None,
        *weights: Tensor,
    ) -> Tensor:
        x_TD = transformed(x, fused_input)
        y_TO = layer.product(x_TD)
        lows: list[Tensor] = []
        for span in spans:
            rows = slice(span.start, span.stop)
            a_DR = _stacked_a(span, x_TD.dtype).T.contiguous()
            low_tR = x_TD.new_empty(span.stop - span.start, a_DR.shape[1])
            add_product(low_tR, span.masked(x_TD[rows]), a_DR, fresh=True)
            lows.append(low_tR)
            r = 0
            for part in span.parts:
                b_OR = part.b.to(x_TD.dtype)
                low = low_tR[:, r : r + b_OR.shape[1]]
                # R inputs are so few that copying the factor costs less than strided reads
                y_tO = y_TO[rows, part.o0 : part.o1]
                y_tO.addmm_(low, b_OR.T.contiguous(), alpha=span.scale)
                r += b_OR.shape[1]
        ctx.layer, ctx.spans, ctx.fused_input = layer, spans, fused_input
        # weights are saved through the spans: the optimizer writes them only between passes
        ctx.save_for_backward(x, *lows)
        return y_TO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *lows = ctx.saved_tensors
        x_TD = transformed(x, ctx.fused_input) if ctx.spans else x
        dy_TO = grads[0].contiguous()
        dx_TD = ctx.layer.weight.transposed_product(dy_TO) if ctx.needs_input_grad[0] else None
        d_weights: list[Tensor] = []
        for span, low_tR in zip(ctx.spans, lows, strict=True):
            rows = slice(span.start, span.stop)
            d_low_tR = torch.empty_like(low_tR)
            d_bs: list[Tensor] = []
            r = 0
            for part in span.parts:
                b_OR = part.b.to(x_TD.dtype)
                columns = slice(r, r + b_OR.shape[1])
                dy_tO = dy_TO[rows, part.o0 : part.o1]
                add_product(d_low_tR[:, columns], dy_tO, b_OR, span.scale, fresh=True)
                d_b = torch.empty_like(b_OR)
                add_product(d_b, dy_tO.T, low_tR[:, columns], span.scale, fresh=True)
                d_bs.append(d_b.to(part.b.dtype))
                r += b_OR.shape[1]
            d_a_RD = torch.empty(
                d_low_tR.shape[1], x_TD.shape[1], dtype=x_TD.dtype, device=x_TD.device
            )
            add_product(d_a_RD, d_low_tR.T, span.masked(x_TD[rows]), fresh=True)
            d_as = torch.split(d_a_RD, [p.a.shape[0] for p in span.parts])
            for part, d_a, d_b in zip(span.parts, d_as, d_bs, strict=True):
                d_weights += [d_a.to(part.a.dtype), d_b]
            if dx_TD is not None:
                _add_input_grad(dx_TD[rows], d_low_tR, span, x_TD.dtype)
        dx = (
            ctx.fused_input.backward(x, dx_TD)
            if ctx.fused_input is not None and dx_TD is not None
            else dx_TD
        )
        return dx, None, None, None, *d_weights


def _add_input_grad(dx_tD: Tensor, d_low_tR: Tensor, span: Span, dtype: torch.dtype) -> None:
    a_RD = _stacked_a(span, dtype)
    if span.dropout == 0:
        dx_tD.addmm_(d_low_tR, a_RD)
    else:
        dx_tD.add_((d_low_tR @ a_RD) * span.mask(dx_tD))


def _stacked_a(span: Span, dtype: torch.dtype) -> Tensor:
    if len(span.parts) == 1:
        return span.parts[0].a.to(dtype)
    return torch.cat([part.a for part in span.parts]).to(dtype)
