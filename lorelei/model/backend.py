"""All that depends on the device: where tensors live, which kernels multiply and attend."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorelei.model.config import GPU_LOGITS, flash_heads
from lorelei.model.kernels import fused

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HOST = torch.device("cpu")


def default_device() -> torch.device:
    """The accelerator when there is one, else the CPU."""
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    return torch.device("cpu")


def dist_backend(device: torch.device, local_ranks: int) -> str:
    """The torch.distributed backends for tensors on `device` and on the CPU."""
    # NCCL refuses two ranks on one GPU
    if device.type == "cuda" and local_ranks <= torch.cuda.device_count():
        return "cpu:gloo,cuda:nccl"
    return "gloo"


def move(model: nn.Module, device: torch.device) -> None:
    """Copy parameters and buffers there; what they held is free, for other processes too.

    Parameters stay the objects they are, and so do FSDP's shards. On a CPU nothing is gained.
    """

    # not .to(), which would do nothing on a CPU, where this is tested
    def copied(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, copy=True)

    # torch's own way to move what a module holds; it has no public one that always copies
    model._apply(copied)  # pyright: ignore[reportPrivateUsage, reportUnknownMemberType]
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def fuses_attention(device: torch.device) -> bool:
    """Whether attention with a returned log-sum-exp is available (see model.attention)."""
    return device.type == "cpu"


def flashes(x: Tensor) -> bool:
    """Whether CUDA's fused attention takes tensors like x [..., d] (see model.flash_attention)."""
    halves = x.dtype in (torch.bfloat16, torch.float16)
    return halves and flash_heads(x.shape[-1]) and _has_flash(x.device)


@cache
def _has_flash(device: torch.device) -> bool:
    """NVIDIA's GPUs from Ampere on; AMD's call themselves cuda too and have other kernels."""
    nvidia = device.type == "cuda" and torch.version.cuda is not None
    return nvidia and torch.cuda.get_device_capability(device)[0] >= 8


def fuses_rms_norm(x: Tensor) -> bool:
    """Whether to use torch's own kernel: on a GPU, launching several costs more than their work."""
    return x.is_cuda


def logits_factor(device: torch.device) -> int:
    """How many times the logits of a CPU's chunk to hold at once: a GPU needs long products."""
    return GPU_LOGITS if device.type == "cuda" else 1


@dataclass(slots=True)
class Weight:
    """A matrix W [O, D] that is multiplied often and never written.

    Where there are kernels it is kept in their layout only.
    """

    held: Tensor  # [O, D], or its panels
    shape: tuple[int, int]

    @classmethod
    def of(cls, weight: Tensor) -> Weight:
        shape = (weight.shape[0], weight.shape[1])
        return cls(fused.pack(weight) if fused.fuses(weight) else weight, shape)

    def product(self, x: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """x [T, D] -> x @ W.T + bias [T, O]; out: memory that it may be written to."""
        if not _is_packed(self.held):
            return F.linear(x, self.held, bias)
        y = fused.product(x, self.held, self.shape[0], out)
        return y if bias is None else y.add_(bias)

    def transposed_product(self, dy: Tensor) -> Tensor:
        """dy [T, O] -> dy @ W [T, D]."""
        if not _is_packed(self.held):
            return dy @ self.held
        return fused.transposed_product(dy, self.held)

    def with_lora_delta(self, a_DR: Tensor, b_RO: Tensor) -> Weight:
        """W + (a @ b).T for products x @ W.T only; the sum is rounded once to a narrower dtype."""
        if _is_packed(self.held):
            return Weight(fused.with_lora_delta(self.held, a_DR, b_RO), self.shape)
        return Weight((self.held + (a_DR @ b_RO).T).to(self.held.dtype), self.shape)

    def dense(self) -> Tensor:
        """W [O, D] in the plain layout, a copy where the weight is packed."""
        return fused.unpack(self.held, self.shape[0]) if _is_packed(self.held) else self.held


@dataclass(frozen=True, slots=True)
class LowRank:
    """A product a [D, R] @ b [R, O] that is multiplied often and never written."""

    a_DR: Tensor
    b: Tensor  # [R, O], or the panels of its transpose where there are kernels

    @classmethod
    def of(cls, a_DR: Tensor, b_RO: Tensor) -> LowRank:
        """A rank that the kernels do not take is padded with zeros."""
        if not fused.fuses(a_DR):
            return cls(a_DR, b_RO)
        spare = -a_DR.shape[1] % fused.lanes()
        b_OR = F.pad(b_RO.T, (0, spare))
        return cls(F.pad(a_DR, (0, spare)).contiguous(), fused.pack(b_OR))

    def add_to(self, y_TO: Tensor, x_TD: Tensor) -> None:
        """y [T, O] += x [T, D] @ a @ b."""
        if _is_packed(self.b):
            fused.add_low_rank(y_TO, x_TD, self.a_DR, self.b)
        else:
            y_TO.addmm_(x_TD @ self.a_DR, self.b)


def _is_packed(weight: Tensor) -> bool:
    return weight.dim() == 3


def add_product(
    y_TO: Tensor, x_TD: Tensor, p_DO: Tensor, scale: float = 1.0, fresh: bool = False
) -> None:
    """y += scale * x @ p; fresh: y = scale * x @ p. For factors that are narrow in some way.

    Of y and p the columns are neighbours; x may be a transposed view.
    """
    if fused.multiplies(x_TD, p_DO):
        fused.add_product(y_TO, x_TD, p_DO, scale, not fresh)
    else:
        torch.addmm(y_TO, x_TD, p_DO, beta=0 if fresh else 1, alpha=scale, out=y_TO)
