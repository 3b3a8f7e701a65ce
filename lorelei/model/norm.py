"""RMS normalisation. Source: Zhang & Sennrich, 2019 (arXiv 1910.07467)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorelei.model.autograd import Function
from lorelei.model.backend import fuses_rms_norm
from lorelei.model.kernels import fused

_aten = torch.ops.aten


@dataclass(frozen=True, slots=True, eq=False)
class RmsNorm:
    """x [..., D] / rms(x) * weight [D], statistics in at least fp32; a FusedInput."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        if fused.fuses(x):
            return fused.rms_norm(x, self.weight, self.eps)
        if fuses_rms_norm(x):
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide, rstd = self._statistics(x)
        return (wide * rstd).to(x.dtype).mul_(self.weight)

    def backward(self, x: Tensor, dy: Tensor) -> Tensor:
        if fused.fuses(x):
            return fused.rms_norm_backward(x, self.weight, self.eps, dy)
        if fuses_rms_norm(x):
            shape, x = list(self.weight.shape), x.contiguous()
            _, rstd = _aten._fused_rms_norm(x, shape, self.weight, self.eps)
            given = (dy.contiguous(), x, shape, rstd, self.weight, [True, False])
            return _aten._fused_rms_norm_backward(*given)[0]
        wide, rstd = self._statistics(x)
        normed = wide * rstd
        grad = (dy * self.weight).to(rstd.dtype)
        inner = (grad * normed).mean(-1, keepdim=True)
        return grad.addcmul_(normed, inner, value=-1).mul_(rstd).to(x.dtype)

    def weight_grad(self, x: Tensor, dy: Tensor) -> Tensor:
        """The gradient [D] of the weight."""
        wide, rstd = self._statistics(x)
        return (dy * wide * rstd).reshape(-1, x.shape[-1]).sum(0).to(self.weight.dtype)

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        return wide, torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(self.eps))


class _RmsNorm(Function):
    """Keeps only the input; autograd's version keeps three tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return RmsNorm(weight, eps)(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        norm = RmsNorm(weight, ctx.eps)
        d_weight = norm.weight_grad(x, grads[0]) if ctx.needs_input_grad[1] else None
        return norm.backward(x, grads[0]), d_weight, None


def rms_norm(x: Tensor, norm: RmsNorm) -> Tensor:
    """The norm with its gradient, where no linear layer follows directly."""
    return _RmsNorm.apply(x, norm.weight, norm.eps)
