"""Attention over a packed batch of segments that share prefixes.

A segment attends causally to itself and fully to its ancestors. Both are computed as blocks
whose outputs are merged by their log-sum-exp, so a prefix shared by many segments is read once
for all of them and no mask is ever built.

Shapes: T tokens, H heads, K key/value heads, d head size, G = H / K.
Source of the merge: Milakov & Gimelshein, 2018 (arXiv 1805.02867); block-wise backward with the
merged statistics: Liu et al., 2023 (arXiv 2310.01889).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorelei.model.autograd import Function
from lorelei.model.backend import flashes, fuses_attention
from lorelei.model.flash_attention import Level, levels, packed_flash
from lorelei.model.kernels import fused

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, slots=True)
class Block:
    """Queries [q0, q1) look at keys [k0, k1), causally when they are the same tokens."""

    q0: int
    q1: int
    k0: int
    k1: int

    @property
    def causal(self) -> bool:
        return self.q0 == self.k0


def tree_blocks(lengths: Sequence[int], parents: Sequence[int]) -> tuple[Block, ...]:
    """Blocks of segments laid out one after another, each directly before its descendants.

    parents: index of each segment's parent, -1 for none. Raises ValueError when a segment's
    descendants do not follow it without a gap.
    """
    last = list(range(len(lengths)))  # the last descendant
    size = [1] * len(lengths)  # descendants and the segment itself
    for i in reversed(range(len(lengths))):  # children come before their parent: counted already
        parent = parents[i]
        if parent >= i:
            raise ValueError(f"segment {i}: parent {parent} does not stand before it")
        if last[i] != i + size[i] - 1:
            raise ValueError(f"segment {i}: its descendants do not follow it without a gap")
        if parent >= 0:
            last[parent] = max(last[parent], last[i])
            size[parent] += size[i]
    ends = list(accumulate(lengths))
    blocks: list[Block] = []
    for i, end in enumerate(ends):
        start = end - lengths[i]
        if start < end:
            blocks.append(Block(start, end, start, end))
            if ends[last[i]] > end:
                blocks.append(Block(end, ends[last[i]], start, end))
    return tuple(blocks)


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of q [B, K, n, d] over k, v [B, K, t, d], and its log-sum-exp [B, K, n].

    mask: [B, 1, 1, t] or [B, 1, n, t], added to the scaled scores. For inference.
    """
    if fuses_attention(q.device):
        return _flash(q, k, v, 0.0, False, attn_mask=mask)
    return plain_attention_with_lse(q, k, v, mask)


def plain_attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same from plain products, for devices without a kernel that returns the log-sum-exp."""
    # statistics in fp32 at least: bf16 keeps 3 digits of a score
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.transpose(-1, -2)).to(wide) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + mask
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp_().to(v.dtype) @ v, lse


class PackedAttention:
    """`attend` for training and prefill over a packed batch."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = tuple(blocks)
        self._levels: tuple[Level, ...] | None = None
        self._trees: fused.Trees | None = None

    def __call__(self, layer: int, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        if fused.attends(q_THd):
            if self._trees is None:
                self._trees = trees(self._blocks)
            return _TreeAttention.apply(q_THd, k_TKd, v_TKd, self._trees)
        if fuses_attention(q_THd.device):
            return _BlockAttention.apply(q_THd, k_TKd, v_TKd, self._blocks)
        if flashes(q_THd):
            if self._levels is None:  # the same for every layer
                self._levels = levels(self._blocks, q_THd.device)
            return packed_flash(q_THd, k_TKd, v_TKd, self._levels)
        return masked_attention(q_THd, k_TKd, v_TKd, self._blocks)


def masked_attention(
    q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, blocks: Sequence[Block]
) -> Tensor:
    """The same by one call of scaled_dot_product_attention a segment, with its ancestors' keys."""
    pieces: list[Tensor] = []
    for own in (b for b in blocks if b.causal):  # in the order of the tokens
        above = [b for b in blocks if not b.causal and b.q0 <= own.q0 and own.q1 <= b.q1]
        keys = torch.cat([k_TKd[b.k0 : b.k1] for b in [*above, own]])
        values = torch.cat([v_TKd[b.k0 : b.k1] for b in [*above, own]])
        length, total = own.q1 - own.q0, len(keys)
        mask = torch.ones(length, total, dtype=torch.bool, device=q_THd.device)
        mask = mask.tril(diagonal=total - length)
        q, k, v = map(_heads_first, (q_THd[own.q0 : own.q1], keys, values))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        pieces.append(mixed[0].transpose(0, 1))
    return torch.cat(pieces)


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1)[None]


def folded(x_tHd: Tensor, kv_heads: int) -> Tensor:
    """[t, K * G, d] -> [1, K, t * G, d]: the queries of a key head as one long row."""
    t, heads, d = x_tHd.shape
    x = x_tHd.view(t, kv_heads, heads // kv_heads, d).transpose(0, 1)
    return x.reshape(1, kv_heads, -1, d)


def unfolded(x: Tensor, t: int) -> Tensor:
    """[1, K, t * G, d] -> [t, K * G, d]."""
    kv_heads, d = x.shape[1], x.shape[-1]
    return x.view(kv_heads, t, -1, d).transpose(0, 1).reshape(t, -1, d)


def trees(blocks: Sequence[Block]) -> fused.Trees:
    """The blocks of `tree_blocks` for the kernel: a tree begins where nothing before is read."""
    starts: list[int] = []  # of trees, in blocks
    end = 0
    for number, block in enumerate(blocks):
        if block.k0 >= end:
            starts.append(number)
        end = max(end, block.q1)
    return fused.Trees(
        torch.tensor([(b.q0, b.q1, b.k0, b.k1) for b in blocks]),
        torch.tensor([*starts, len(blocks)]),
        torch.tensor([*(blocks[number].k0 for number in starts), end]),
    )


class _TreeAttention(Function):
    """By the C kernel. q, k and v are views of one tensor, so keeping them keeps it once."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, trees: fused.Trees) -> Tensor:
        q, k, v = (fused.whole_rows(x) for x in (q, k, v))
        out, lse = fused.tree_attention(q, k, v, trees)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.trees = trees
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        return *fused.tree_attention_backward(q, k, v, ctx.trees, out, lse, grads[0]), None


class _BlockAttention(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: tuple[Block, ...]) -> Tensor:
        v = v.contiguous()  # kept for the backward pass: a view would keep all of q, k and v
        kv_heads, groups = k.shape[1], q.shape[1] // k.shape[1]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse_TH = torch.empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
        for b in (b for b in blocks if b.causal):
            wide_k, wide_v = (x[b.k0 : b.k1].repeat_interleave(groups, 1) for x in (k, v))
            o, lse = _flash(*map(_heads_first, (q[b.q0 : b.q1], wide_k, wide_v)), 0.0, True)
            out[b.q0 : b.q1] = o[0].transpose(0, 1)
            lse_TH[b.q0 : b.q1] = lse[0].T
        for b in (b for b in blocks if not b.causal):
            rows = slice(b.q0, b.q1)
            keys, values = (_heads_first(x[b.k0 : b.k1]) for x in (k, v))
            o, lse = _flash(folded(q[rows], kv_heads), keys, values, 0.0, False)
            lse = unfolded(lse[..., None], b.q1 - b.q0)[..., 0]
            merged = torch.logaddexp(lse_TH[rows], lse)
            share = (lse - merged).exp_()[..., None].to(q.dtype)
            # softmax over both key sets = the two outputs weighted by exp(lse - merged lse)
            out[rows].lerp_(unfolded(o, b.q1 - b.q0), share)
            lse_TH[rows] = merged
        ctx.save_for_backward(q, k, v, out, lse_TH)
        ctx.blocks = blocks
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        # a block's backward pass needs the probabilities exp(score - lse) of the whole softmax and
        # sum(grad * out) of the whole output: given the merged lse and out, it gives the exact
        # gradient of its share, and the shares add up
        q, k, v, out, lse_TH = ctx.saved_tensors
        grad = grads[0]
        kv_heads, groups = k.shape[1], q.shape[1] // k.shape[1]
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        for b in (b for b in ctx.blocks if b.causal):
            rows, t = slice(b.q0, b.q1), b.q1 - b.q0
            wide_k, wide_v = (x[b.k0 : b.k1].repeat_interleave(groups, 1) for x in (k, v))
            args = map(_heads_first, (grad[rows], q[rows], wide_k, wide_v, out[rows]))
            lse = lse_TH[rows].T.contiguous()[None]
            gq, gk, gv = _flash_backward(*args, lse, 0.0, True)
            dq[rows] = gq[0].transpose(0, 1)
            dk[rows] += gk[0].transpose(0, 1).reshape(t, kv_heads, groups, -1).sum(2)
            dv[rows] += gv[0].transpose(0, 1).reshape(t, kv_heads, groups, -1).sum(2)
        for b in (b for b in ctx.blocks if not b.causal):
            rows, t = slice(b.q0, b.q1), b.q1 - b.q0
            folded_grad, folded_q, folded_out = (folded(x[rows], kv_heads) for x in (grad, q, out))
            lse = folded(lse_TH[rows, :, None], kv_heads)[..., 0].contiguous()
            keys, values = (_heads_first(x[b.k0 : b.k1]) for x in (k, v))
            gq, gk, gv = _flash_backward(
                folded_grad, folded_q, keys, values, folded_out, lse, 0.0, False
            )
            dq[rows] += unfolded(gq, t)
            dk[b.k0 : b.k1] += gk[0].transpose(0, 1)
            dv[b.k0 : b.k1] += gv[0].transpose(0, 1)
        return dq, dk, dv, None
