"""The one place that knows devices: where tensors live and which kernels multiply and attend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def default_device() -> torch.device:
    """The accelerator when there is one, else the CPU."""
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    return torch.device("cpu")


def dist_backend(device: torch.device) -> str:
    """The torch.distributed backends for tensors on `device` and on the CPU."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def fuses_attention(device: torch.device) -> bool:
    """Whether attention with a returned log-sum-exp is available (see model.attention)."""
    return device.type == "cpu"


@dataclass(slots=True)
class Weight:
    """A matrix W [O, D] that is multiplied often and never written.

    On a CPU in fp32 it is kept in oneDNN's blocked layout only, one copy for x @ W.T and, once
    a backward pass asks for it, one for dy @ W; products are faster than with the plain layout.
    """

    forward: Tensor
    backward: Tensor | None
    shape: tuple[int, int]

    @classmethod
    def of(cls, weight: Tensor, kept: bool = False) -> Weight:
        """kept: the plain tensor stays in memory anyway (a tied embedding), so use it too."""
        shape = (weight.shape[0], weight.shape[1])
        on_cpu = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
        if on_cpu and weight.dtype == torch.float32:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
            return cls(packed, weight if kept else None, shape)
        return cls(weight, weight, shape)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, D] -> x @ W.T + bias [T, O]."""
        if self.forward.is_mkldnn:
            return torch.ops.mkldnn._linear_pointwise(x, self.forward, bias, "none", [], "")
        return F.linear(x, self.forward, bias)

    def transposed_product(self, dy: Tensor) -> Tensor:
        """dy [T, O] -> dy @ W [T, D]."""
        if self.backward is None:
            transposed = self.dense().T.contiguous()
            self.backward = torch.ops.mkldnn._reorder_linear_weight(transposed)
        if not self.backward.is_mkldnn:
            return dy @ self.backward
        return torch.ops.mkldnn._linear_pointwise(dy, self.backward, None, "none", [], "")

    def dense(self) -> Tensor:
        """W [O, D] in the plain layout, a copy where the weight is packed."""
        return self.forward.to_dense() if self.forward.is_mkldnn else self.forward
