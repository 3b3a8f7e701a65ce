"""The gated MLP, and the mixture of experts made of it.

Shapes: T tokens, D hidden, F intermediate, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorelei.model.linear import FrozenLinear, Route


class _SwiGlu(torch.autograd.Function):
    """silu(gate) * up of a fused [T, 2F]; keeps only its input."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        d_gate, d_up = out.chunk(2, dim=-1)
        d_gate.copy_(torch.ops.aten.silu_backward(grads[0] * up, gate))
        torch.mul(grads[0], F.silu(gate), out=d_up)
        return out


@dataclass(frozen=True, slots=True, eq=False)
class Mlp:
    """down(silu(gate(x)) * up(x))."""

    gate_up: FrozenLinear
    down: FrozenLinear

    def __call__(self, x_TD: Tensor, route: Route) -> Tensor:
        hidden: Tensor = _SwiGlu.apply(route(self.gate_up, x_TD))  # type: ignore[assignment]
        return route(self.down, hidden)


@dataclass(frozen=True, slots=True, eq=False)
class Moe:
    """Each token goes through its top-k experts, weighted by the router's softmax."""

    router: Tensor  # [E, D], frozen, never adapted
    experts: tuple[Mlp, ...]
    per_token: int
    normalise: bool

    def __call__(self, x_TD: Tensor, route: Route) -> Tensor:
        scores_TE = F.softmax(F.linear(x_TD, self.router), dim=-1, dtype=torch.float32)
        weights, chosen = scores_TE.topk(self.per_token, dim=-1)  # [T, k]
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights.to(x_TD.dtype)
        out_TD = torch.zeros_like(x_TD)
        for number, expert in enumerate(self.experts):
            tokens, slot = (chosen == number).nonzero(as_tuple=True)  # ascending, as take() needs
            if len(tokens) == 0:
                continue
            y = expert(x_TD[tokens], route.take(tokens))
            out_TD.index_add_(0, tokens, y * weights[tokens, slot, None])
        return out_TD
