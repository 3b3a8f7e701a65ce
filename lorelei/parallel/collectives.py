"""Exchanges between the processes of a team, with their gradients.

A team of one exchanges nothing.
"""
# pyright: reportUnknownMemberType=false
# torch.distributed declares no types

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lorelei.model.autograd import Function
from lorelei.parallel.mesh import Team


def spread(x: Tensor, team: Team) -> Tensor:
    """x, the same everywhere, where each process goes on with other parts of a matrix."""
    return x if team.size == 1 else _Spread.apply(x, team)


def summed(x: Tensor, team: Team) -> Tensor:
    """The sum of every process's x; what follows is the same everywhere."""
    return x if team.size == 1 else _Summed.apply(x, team)


def gathered(x: Tensor, team: Team) -> Tensor:
    """[..., n] of each process -> [..., n * size]; what follows is the same everywhere."""
    return x if team.size == 1 else _Gathered.apply(x, team)


def divided(x: Tensor, team: Team) -> Tensor:
    """[..., n * size], the same everywhere -> this process's [..., n]."""
    return x if team.size == 1 else _Divided.apply(x, team)


def exchanged(x: Tensor, team: Team) -> Tensor:
    """[size, ...]: entry i goes to process i; what comes back from process i is entry i."""
    return x if team.size == 1 else _Exchanged.apply(x, team)


def _sum(x: Tensor, team: Team) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=team.group)
    return total


def _gather(x: Tensor, team: Team) -> Tensor:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(team.size)]
    dist.all_gather(parts, x.contiguous(), group=team.group)
    return torch.cat(parts, dim=-1)


def _own(x: Tensor, team: Team) -> Tensor:
    start, stop = team.part(x.shape[-1])
    return x[..., start:stop].contiguous()


def _exchange(x: Tensor, team: Team) -> Tensor:
    got = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(got, x.contiguous(), group=team.group)
    return got


class _Spread(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, team: Team) -> Tensor:
        ctx.team = team
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum(grads[0], ctx.team), None


class _Summed(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, team: Team) -> Tensor:
        return _sum(x, team)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Gathered(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, team: Team) -> Tensor:
        ctx.team = team
        return _gather(x, team)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _own(grads[0], ctx.team), None


class _Divided(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, team: Team) -> Tensor:
        ctx.team = team
        return _own(x, team)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gather(grads[0], ctx.team), None


class _Exchanged(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, team: Team) -> Tensor:
        ctx.team = team
        return _exchange(x, team)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _exchange(grads[0], ctx.team), None
