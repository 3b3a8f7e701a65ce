"""Exchanges between the processes of an axis, with their gradients.

A single process exchanges nothing.
"""
# pyright: reportUnknownMemberType=false
# torch.distributed declares no types

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lorelei.model.autograd import Function
from lorelei.parallel.mesh import Axis


def spread(x: Tensor, axis: Axis) -> Tensor:
    """x, the same everywhere, before each process multiplies with its part of a matrix."""
    return x if axis.size == 1 else _Spread.apply(x, axis)


def summed(x: Tensor, axis: Axis) -> Tensor:
    """The sum of every process's x; what follows is the same everywhere."""
    return x if axis.size == 1 else _Summed.apply(x, axis)


def gathered(x: Tensor, axis: Axis) -> Tensor:
    """[..., n] of each process -> [..., n * size]; what follows is the same everywhere."""
    return x if axis.size == 1 else _Gathered.apply(x, axis)


def divided(x: Tensor, axis: Axis) -> Tensor:
    """[..., n * size], the same everywhere -> this process's [..., n]."""
    return x if axis.size == 1 else _Divided.apply(x, axis)


def exchanged(x: Tensor, axis: Axis) -> Tensor:
    """[size, ...]: entry i goes to process i; what comes back from process i is entry i."""
    return x if axis.size == 1 else _Exchanged.apply(x, axis)


def _sum(x: Tensor, axis: Axis) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=axis.group)
    return total


def _gather(x: Tensor, axis: Axis) -> Tensor:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(axis.size)]
    dist.all_gather(parts, x.contiguous(), group=axis.group)
    return torch.cat(parts, dim=-1)


def _own(x: Tensor, axis: Axis) -> Tensor:
    start, stop = axis.part(x.shape[-1])
    return x[..., start:stop].contiguous()


def _exchange(x: Tensor, axis: Axis) -> Tensor:
    got = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(got, x.contiguous(), group=axis.group)
    return got


class _Spread(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum(grads[0], ctx.axis), None


class _Summed(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return _sum(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Gathered(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _gather(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _own(grads[0], ctx.axis), None


class _Divided(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _own(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gather(grads[0], ctx.axis), None


class _Exchanged(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _exchange(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _exchange(grads[0], ctx.axis), None
