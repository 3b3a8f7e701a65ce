"""The gated MLP, and the mixture of experts made of it.

Shapes: T tokens, D hidden, F intermediate, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lorelei.model.kernels import fused
from lorelei.model.linear import FrozenLinear, Route
from lorelei.model.norm import RmsNorm, rms_norm


class SwiGlu:
    """silu(gate) * up of a fused [T, 2F], as FusedInput. Source: Shazeer, 2020 (2002.05202)."""

    def __call__(self, x: Tensor) -> Tensor:
        if fused.fuses(x):
            return fused.swiglu(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def backward(self, x: Tensor, dy: Tensor) -> Tensor:
        if fused.fuses(x):
            return fused.swiglu_backward(x, dy)
        gate, up = x.chunk(2, dim=-1)
        dx = torch.empty_like(x)
        d_gate, d_up = dx.chunk(2, dim=-1)
        torch.ops.aten.silu_backward(dy * up, gate, grad_input=d_gate)
        torch.mul(dy, F.silu(gate), out=d_up)
        return dx


SWIGLU = SwiGlu()


@dataclass(frozen=True, slots=True, eq=False)
class Mlp:
    """down(silu(gate(x)) * up(x))."""

    gate_up: FrozenLinear
    down: FrozenLinear

    def __call__(self, x_TD: Tensor, route: Route, norm: RmsNorm | None = None) -> Tensor:
        """norm: what x goes through first."""
        return route(self.down, route(self.gate_up, x_TD, norm), SWIGLU)


@dataclass(frozen=True, slots=True, eq=False)
class Moe:
    """Each token goes through its top-k experts, weighted by the router's softmax."""

    router: Tensor  # [E, D], frozen, never adapted
    experts: tuple[Mlp, ...]
    per_token: int
    normalise: bool

    def __call__(self, x_TD: Tensor, route: Route, norm: RmsNorm) -> Tensor:
        x_TD = rms_norm(x_TD, norm)  # not left to the experts: the router reads it too
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
