"""Exchanges between the processes of an axis, with their gradients.

A single process exchanges nothing.
"""
# pyright: reportUnknownMemberType=false
# torch.distributed declares no types

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lorelei.model.autograd import Function
from lorelei.parallel.mesh import Axis

_OneWay = Callable[[Tensor, Axis], Tensor]


def spread(x: Tensor, axis: Axis) -> Tensor:
    """x, the same everywhere, before each process multiplies with its part of a matrix."""
    return _Exchange.over(x, axis, _same, _sum)


def summed(x: Tensor, axis: Axis) -> Tensor:
    """The sum of every process's x; what follows is the same everywhere."""
    return _Exchange.over(x, axis, _sum, _same)


def gathered(x: Tensor, axis: Axis) -> Tensor:
    """[..., n] of each process -> [..., n * size]; what follows is the same everywhere."""
    return _Exchange.over(x, axis, _gather, _own)


def divided(x: Tensor, axis: Axis) -> Tensor:
    """[..., n * size], the same everywhere -> this process's [..., n]."""
    return _Exchange.over(x, axis, _own, _gather)


def exchanged(x: Tensor, axis: Axis) -> Tensor:
    """[size, ...]: entry i goes to process i; what comes back from process i is entry i."""
    return _Exchange.over(x, axis, _swap, _swap)


def _same(x: Tensor, axis: Axis) -> Tensor:
    return x.view_as(x)


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


def _swap(x: Tensor, axis: Axis) -> Tensor:
    got = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(got, x.contiguous(), group=axis.group)
    return got


class _Exchange(Function):
    """One exchange on the way forward, its transpose on the way back."""

    @classmethod
    def over(cls, x: Tensor, axis: Axis, ahead: _OneWay, back: _OneWay) -> Tensor:
        return x if axis.size == 1 else cls.apply(x, axis, ahead, back)

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, ahead: _OneWay, back: _OneWay) -> Tensor:
        ctx.axis, ctx.back = axis, back
        return ahead(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.back(grads[0], ctx.axis), None, None, None
