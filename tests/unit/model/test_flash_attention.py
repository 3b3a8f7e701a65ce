"""Attention on CUDA: what is around its kernels everywhere, the kernels where there is a GPU."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lorelei.model import flash_attention
from lorelei.model.attention import tree_blocks
from lorelei.model.flash_attention import Level, levels, packed_flash
from tests.unit.model.test_attention import TREES, dense_attention, inputs, relative

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
# outputs rounded to 8 bits: half a unit in the last place is 2e-3, and gradients add some up
BF16, BF16_GRADIENT = 1e-2, 2e-2


def scores(q: Tensor, k: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """[H, n, t], and each query head's keys."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    found = torch.einsum("nhd,thd->hnt", q, k) * q.shape[-1] ** -0.5
    if causal:
        found = found.masked_fill(torch.ones(found.shape[1:]).triu(1).bool(), -torch.inf)
    return found, k


def rows(level: Level) -> list[tuple[slice, slice]]:
    ends = [pairwise(e.tolist()) for e in (level.q_ends, level.k_ends)]
    return [(slice(*q), slice(*k)) for q, k in zip(*ends, strict=True)]


def plain_forward(q: Tensor, k: Tensor, v: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """What the kernel is documented to do, block by block."""
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0])
    for at, seen in rows(level):
        s, _ = scores(q[at], k[seen], level.causal)
        wide_v = v[seen].repeat_interleave(q.shape[1] // v.shape[1], 1)
        out[at] = torch.einsum("hnt,thd->nhd", s.softmax(-1), wide_v)
        lse[:, at] = s.logsumexp(-1)
    return out, lse


def plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, level: Level
) -> tuple[Tensor, Tensor, Tensor]:
    """From the output and the log-sum-exp that it is given, as the kernel does."""
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    kv_heads, groups, scale = k.shape[1], q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
    for at, seen in rows(level):
        s, wide_k = scores(q[at], k[seen], level.causal)
        wide_v = v[seen].repeat_interleave(groups, 1)
        p = (s - lse[:, at, None]).exp()
        dp = torch.einsum("nhd,thd->hnt", grad[at], wide_v)
        ds = p * (dp - (grad[at] * out[at]).sum(-1).T[..., None]) * scale
        dq[at] = torch.einsum("hnt,thd->nhd", ds, wide_k)
        wide = torch.einsum("hnt,nhd->thd", ds, q[at]), torch.einsum("hnt,nhd->thd", p, grad[at])
        dk[seen], dv[seen] = (x.unflatten(1, (kv_heads, groups)).sum(2) for x in wide)
    return dq, dk, dv


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("tree", TREES)
def test_levels_and_their_merge_are_attention_by_definition(
    tree: str, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash_attention, "_forward", plain_forward)
    monkeypatch.setattr(flash_attention, "_backward", plain_backward)
    lengths, parents = TREES[tree]
    given = inputs(sum(lengths), *heads, torch.float64)
    out = packed_flash(*given, levels(tree_blocks(lengths, parents), CPU))
    expected = dense_attention(*given, lengths, parents)
    assert relative(out, expected) < 1e-10
    cotangent = torch.randn_like(out)
    wanted = torch.autograd.grad(expected, given, cotangent)
    for got, want in zip(torch.autograd.grad(out, given, cotangent), wanted, strict=True):
        assert relative(got, want) < 1e-10


def test_prefixes_side_by_side_share_a_level_and_nested_ones_do_not() -> None:
    side_by_side = levels(tree_blocks([3, 2, 4, 5], [-1, 0, -1, 2]), CPU)
    assert [level.q_ends.tolist() for level in side_by_side] == [[0, 3, 5, 9, 14], [0, 2, 7]]
    assert [level.k_ends.tolist() for level in side_by_side[1:]] == [[0, 3, 7]]
    nested = levels(tree_blocks([5, 3, 2, 4, 6], [-1, 0, 1, 1, 0]), CPU)
    assert [level.k_ends.tolist() for level in nested[1:]] == [[0, 5], [0, 3]]


@needs_gpu
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("tree", TREES)
def test_cuda_attention_in_bf16_is_the_definition_to_bf16_precision(
    tree: str, heads: tuple[int, int]
) -> None:
    lengths, parents = TREES[tree]
    wide = [x.detach().bfloat16().float() for x in inputs(sum(lengths), *heads, torch.float32)]
    given = [x.cuda().bfloat16().requires_grad_() for x in wide]
    out = packed_flash(*given, levels(tree_blocks(lengths, parents), given[0].device))
    leaves = [x.requires_grad_() for x in wide]
    expected = dense_attention(*leaves, lengths, parents)
    assert relative(out.cpu().float(), expected) < BF16
    cotangent = torch.randn(expected.shape).bfloat16()
    got_grads = torch.autograd.grad(out, given, cotangent.cuda())
    wanted = torch.autograd.grad(expected, leaves, cotangent.float())
    for got, want in zip(got_grads, wanted, strict=True):
        assert relative(got.cpu().float(), want) < BF16_GRADIENT
