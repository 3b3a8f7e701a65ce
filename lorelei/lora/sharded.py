"""Tensors of which each process holds a part (DTensor): gathered, and set from a whole one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it; every process of its mesh calls it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(full: Tensor, like: Tensor) -> Tensor:
    """A copy of a whole tensor, on the device, in the dtype and in parts as another one."""
    moved = full.to(like.device, like.dtype, copy=True)
    if not isinstance(like, DTensor):
        return moved
    # every process has the whole and takes its own part: nothing is sent
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)


def set_from(target: Tensor, full: Tensor) -> None:
    """Overwrite a tensor with a whole one's values."""
    with torch.no_grad():
        target.copy_(part_like(full, target))
