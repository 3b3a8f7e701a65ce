"""Context parallelism: each rank has a run of a row's tokens, and some of the heads in attention.

Shapes: T tokens of the row, t of this rank; H heads, h of this rank; d head size; I items of the
row, i whose sources are here.
Source: Jacobs et al., 2023 (DeepSpeed-Ulysses, arXiv 2309.14509).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings
from torch import Tensor

from lorelei.train.megatron.layout import Axis


def to_heads(x_tHd: Tensor, axis: Axis) -> Tensor:
    """[t, H, d] -> [T, h, d]."""
    if axis.size == 1:
        return x_tHd
    t, heads, d = x_tHd.shape
    by_rank = x_tHd.view(t, axis.size, heads // axis.size, d).transpose(0, 1).contiguous()
    return mappings.all_to_all(axis.group, by_rank.flatten(0, 1))


def to_tokens(x_Thd: Tensor, axis: Axis) -> Tensor:
    """[T, h, d] -> [t, H, d]."""
    if axis.size == 1:
        return x_Thd
    tokens, heads, d = x_Thd.shape
    by_rank = mappings.all_to_all(axis.group, x_Thd.contiguous())
    by_rank = by_rank.view(axis.size, tokens // axis.size, heads, d)
    return by_rank.transpose(0, 1).flatten(1, 2)


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
    return both[0].index_put((here_i,), logprobs_i), both[1]
