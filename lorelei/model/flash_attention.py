"""Attention by CUDA's fused kernels, which return the log-sum-exp of what they read.

A packed batch takes one call for every segment with itself, and one for each level of shared
prefixes; the outputs are merged as in model.attention.

Shapes: T tokens, H heads, K key/value heads, d head size, t tokens of a level, B blocks of a level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorelei.model.autograd import Function

if TYPE_CHECKING:
    from lorelei.model.attention import Block

_aten = torch.ops.aten


@dataclass(frozen=True, slots=True, eq=False)
class Level:
    """Blocks of which no two share queries or keys: one call of the kernel."""

    queries: Tensor | None  # [t] rows of q; None: all, in order
    keys: Tensor | None
    q_ends: Tensor  # [B + 1] int32, from 0
    k_ends: Tensor
    longest_q: int
    longest_k: int
    causal: bool


def levels(blocks: Sequence[Block], device: torch.device) -> tuple[Level, ...]:
    """The causal blocks, then the others in as few levels as their nesting allows."""
    nested: list[list[Block]] = []
    for block in (b for b in blocks if not b.causal):  # a block comes before those nested in it
        free = (level for level in nested if level[-1].q1 <= block.q0)
        level = next(free, None)
        if level is None:
            nested.append([block])
        else:
            level.append(block)
    own = [b for b in blocks if b.causal]
    return (_level(own, True, device), *(_level(level, False, device) for level in nested))


def _level(blocks: Sequence[Block], causal: bool, device: torch.device) -> Level:
    queries = [(b.q0, b.q1) for b in blocks]
    keys = [(b.k0, b.k1) for b in blocks]
    return Level(
        queries=None if causal else _rows(queries, device),
        keys=None if causal else _rows(keys, device),
        q_ends=_ends(queries, device),
        k_ends=_ends(keys, device),
        longest_q=max(stop - start for start, stop in queries),
        longest_k=max(stop - start for start, stop in keys),
        causal=causal,
    )


def _rows(spans: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    return torch.cat([torch.arange(*span) for span in spans]).to(device)


def _ends(spans: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    ends = [0, *accumulate(stop - start for start, stop in spans)]
    return torch.tensor(ends, dtype=torch.int32, device=device)


def packed_flash(q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, levels: tuple[Level, ...]) -> Tensor:
    """Attention of a packed batch -> [T, H, d]. bf16 or fp16."""
    return _PackedFlash.apply(q_THd, k_TKd, v_TKd, levels)


class _PackedFlash(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, levels: tuple[Level, ...]) -> Tensor:
        v = v.contiguous()  # kept for the backward pass: a view would keep all of q, k and v
        own, *shared = levels
        out, lse_HT = _forward(q, k, v, own)
        for level in shared:
            rows = level.queries
            part, lse_Ht = _forward(q[rows], k[level.keys], v[level.keys], level)
            merged_Ht = torch.logaddexp(lse_HT[:, rows], lse_Ht)
            # fp32: a share of 8 bits would move the output by more than rounding does
            share = (lse_Ht - merged_Ht).exp_().T[..., None]
            out[rows] = out[rows].to(share.dtype).lerp_(part.to(share.dtype), share).to(out.dtype)
            lse_HT[:, rows] = merged_Ht
        ctx.save_for_backward(q, k, v, out, lse_HT)
        ctx.levels = levels
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        # with the merged output and log-sum-exp each block gives its exact share of the gradient,
        # see model.attention
        q, k, v, out, lse_HT = ctx.saved_tensors
        own, *shared = ctx.levels
        grad = grads[0].contiguous()
        dq, dk, dv = _backward(grad, q, k, v, out, lse_HT, own)
        for level in shared:
            rows, keys = level.queries, level.keys
            lse_Ht = lse_HT[:, rows].contiguous()
            gq, gk, gv = _backward(grad[rows], q[rows], k[keys], v[keys], out[rows], lse_Ht, level)
            # no row stands twice in a level, so the order of additions is fixed
            dq.index_add_(0, rows, gq)
            dk.index_add_(0, keys, gk)
            dv.index_add_(0, keys, gv)
        return dq, dk, dv, None


def _forward(q: Tensor, k: Tensor, v: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """[t, H, d] and its log-sum-exp [H, t] in fp32."""
    sizes = (level.q_ends, level.k_ends, level.longest_q, level.longest_k)
    out, lse, *_ = _aten._flash_attention_forward(q, k, v, *sizes, 0.0, level.causal, False)
    return out, lse


def flash_spans(
    q_THd: Tensor,
    k: Tensor,
    v: Tensor,
    q_ends: Tensor,
    k_starts: Tensor,
    k_lengths: Tensor,
    longest_q: int,
) -> tuple[Tensor, Tensor]:
    """Attention -> [T, H, d] and its log-sum-exp [H, T] in fp32; bf16 or fp16. For inference.

    Queries q_ends[b] to q_ends[b + 1] look at keys and values [A, K, d] from k_starts[b] on,
    k_lengths[b] of them. All int32; q_ends and k_starts have one more value than k_lengths.
    """
    # the kernel lays out its results differently for a longest query of 1
    sizes = (q_ends, k_starts, max(longest_q, 2), len(k))
    out, lse, *_ = _aten._flash_attention_forward(
        q_THd, k, v, *sizes, 0.0, False, False, seqused_k=k_lengths
    )
    return out, lse


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, level: Level
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (level.q_ends, level.k_ends, level.longest_q, level.longest_k)
    # states of a random stream, which only dropout reads
    unused = torch.zeros(2, dtype=torch.uint64, device=q.device), q.new_empty(0)
    return _aten._flash_attention_backward(
        grad, q, k, v, out, lse, *sizes, 0.0, level.causal, *unused
    )
