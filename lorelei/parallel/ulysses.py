"""Sequence parallelism: each process has a run of a row's tokens, and some heads in attention.

Shapes: T tokens of the row, t of this process; H heads, h of this process; d head size; I items of
the row, i whose sources are here.
Source: Jacobs et al., 2023 (DeepSpeed Ulysses, arXiv 2309.14509).
"""

# pyright: reportUnknownMemberType=false
# torch.distributed declares no types

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lorelei.parallel.collectives import exchanged
from lorelei.parallel.mesh import Axis


def to_heads(x_tHd: Tensor, axis: Axis) -> Tensor:
    """[t, H, d] -> [T, h, d]."""
    if axis.size == 1:
        return x_tHd
    t, heads, d = x_tHd.shape
    parts = x_tHd.reshape(t, axis.size, heads // axis.size, d).transpose(0, 1)
    return exchanged(parts, axis).flatten(0, 1)


def to_tokens(x_Thd: Tensor, axis: Axis) -> Tensor:
    """[T, h, d] -> [t, H, d]."""
    if axis.size == 1:
        return x_Thd
    tokens, heads, d = x_Thd.shape
    parts = exchanged(x_Thd.reshape(axis.size, tokens // axis.size, heads, d), axis)
    return parts.transpose(0, 1).flatten(1, 2)


def of_all_items(
    outputs: tuple[Tensor, Tensor], here_i: Tensor, count: int, axis: Axis
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [I] from those [i]; the others' have no gradient here."""
    if axis.size == 1:
        return outputs
    logprobs_i, entropy_i = outputs
    both = torch.zeros(2, count, dtype=logprobs_i.dtype, device=logprobs_i.device)
    both[:, here_i] = torch.stack([logprobs_i.detach(), entropy_i])
    dist.all_reduce(both, group=axis.group)
    # put in once more, with their gradient: every process has the same loss of all items
    return both[0].index_put((here_i,), logprobs_i), both[1]
