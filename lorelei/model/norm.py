"""RMS normalisation. Source: Zhang & Sennrich, 2019 (arXiv 1910.07467)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _RmsNorm(torch.autograd.Function):
    """Keeps the input and one number a row; autograd's version keeps three tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
        ctx.save_for_backward(x, weight, rstd)
        return (wide * rstd).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, rstd = ctx.saved_tensors
        normed = x.to(rstd.dtype) * rstd
        grad = (grads[0] * weight).to(rstd.dtype)
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (grads[0] * normed).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        inner = (grad * normed).mean(-1, keepdim=True)
        return grad.addcmul_(normed, inner, value=-1).mul_(rstd).to(x.dtype), d_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] / rms(x) * weight [D], statistics in at least fp32."""
    return _RmsNorm.apply(x, weight, eps)  # type: ignore[no-any-return]
