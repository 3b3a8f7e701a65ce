"""Attention over shared prefixes, and the decoder's own autograd functions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lorelei.lora.linear import LoraPart, Span, lora_linear
from lorelei.model.attention import (
    PackedAttention,
    _BlockAttention,
    masked_attention,
    tree_blocks,
)
from lorelei.model.kernels.build import library
from lorelei.model.linear import FrozenLinear, FusedInput
from lorelei.model.mlp import SWIGLU
from lorelei.model.norm import RmsNorm, rms_norm
from lorelei.model.rope import rotate

TREES = {
    "one": ([9], [-1]),
    "packed": ([4, 1, 130, 7], [-1, -1, -1, -1]),
    "group": ([6, 3, 5, 1], [-1, 0, 0, 0]),
    "two levels": ([5, 3, 2, 4, 6], [-1, 0, 1, 1, 0]),
    "two trees": ([5, 3, 2, 4, 6], [-1, 0, -1, 2, 3]),
    "empty segments": ([0, 3, 5, 0, 2], [-1, 0, 0, 2, 2]),
    "long": ([200, 70, 33], [-1, 0, 0]),
}
MANY = {"packed": 5, "long": 5}  # times: several tiles of 64 in every segment, 23 for the others
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def dense_attention(
    q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, lengths: list[int], parents: list[int]
) -> Tensor:
    """The definition: a token sees what stands before it on its path from the root."""
    owner_T = torch.repeat_interleave(torch.tensor(lengths))
    above: list[set[int]] = []
    for parent in parents:
        above.append(set() if parent < 0 else above[parent] | {parent})
    below = torch.tensor(
        [[b in above[a] for b in range(len(lengths))] for a in range(len(lengths))]
    )
    at_T = torch.arange(len(owner_T))
    own = (owner_T[:, None] == owner_T) & (at_T <= at_T[:, None])
    sees = below[owner_T][:, owner_T] | own
    groups = q_THd.shape[1] // k_TKd.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k_TKd, v_TKd))
    scores_HTT = torch.einsum("xhd,yhd->hxy", q_THd, k) / q_THd.shape[-1] ** 0.5
    weights = scores_HTT.masked_fill(~sees, -torch.inf).softmax(-1)
    return torch.einsum("hxy,yhd->xhd", weights, v)


def inputs(tokens: int, heads: int, kv_heads: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, heads, 16), (tokens, kv_heads, 16), (tokens, kv_heads, 16)]
    return [
        torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes
    ]


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("form", ["blocks", "masked"])
def test_attention_and_its_gradients_are_those_of_the_definition(
    form: str, tree: str, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    lengths, parents = TREES[tree]
    attend = _BlockAttention.apply if form == "blocks" else masked_attention
    given = inputs(sum(lengths), *heads, dtype)
    out = attend(*given, tree_blocks(lengths, parents))
    expected = dense_attention(*given, lengths, parents)
    assert relative(out, expected) < TOLERANCE[dtype]
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    got_grads = torch.autograd.grad(out, given, cotangent)
    for got, wanted in zip(got_grads, torch.autograd.grad(expected, given, cotangent), strict=True):
        assert relative(got, wanted) < TOLERANCE[dtype]


@pytest.mark.skipif(library() is None, reason="no C compiler for the kernels here")
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("tree", TREES)
def test_the_attention_kernel_and_its_gradients_are_those_of_the_definition(
    tree: str, many: bool, d: int
) -> None:
    times = MANY.get(tree, 23) if many else 1
    lengths, parents = [n * times for n in TREES[tree][0]], TREES[tree][1]
    qkv = torch.randn(sum(lengths), 8, d, generator=torch.Generator().manual_seed(0))
    exact = qkv.double().requires_grad_()
    qkv.requires_grad_()
    out = PackedAttention(tree_blocks(lengths, parents))(0, *qkv.split([4, 2, 2], dim=1))
    expected = dense_attention(*exact.split([4, 2, 2], dim=1), lengths, parents)
    assert relative(out.double(), expected) < 2e-6
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (got,) = torch.autograd.grad(out, qkv, cotangent)
    (wanted,) = torch.autograd.grad(expected, exact, cotangent.double())
    assert relative(got.double(), wanted) < 5e-6


def test_attention_reads_the_views_that_the_decoder_hands_it() -> None:
    """Values are a slice of the fused projection, and a gradient may be an expanded scalar."""
    lengths, parents = TREES["two levels"]
    blocks = tree_blocks(lengths, parents)
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(20, 8, 16, generator=generator, dtype=torch.float64).requires_grad_()
    q, k, v = fused.split([4, 2, 2], dim=1)
    (got,) = torch.autograd.grad(_BlockAttention.apply(q, k, v, blocks).sum(), fused)
    (wanted,) = torch.autograd.grad(dense_attention(q, k, v, lengths, parents).sum(), fused)
    assert relative(got, wanted) < 1e-10


def test_attention_in_bf16_is_fp32_attention_to_bf16_precision() -> None:
    lengths, parents = TREES["group"]
    given = inputs(sum(lengths), 4, 2, torch.bfloat16)
    out = _BlockAttention.apply(*given, tree_blocks(lengths, parents))
    assert out.dtype == torch.bfloat16
    wide = [x.detach().float() for x in given]
    assert relative(out.float(), dense_attention(*wide, lengths, parents)) < 1e-2
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.float().sum(), given))


@pytest.mark.parametrize(
    ("lengths", "parents", "message"),
    [
        ([1, 1], [1, -1], "segment 0: parent 1 does not stand before it"),
        ([1, 1, 1], [-1, -1, 0], "segment 0: its descendants do not follow it without a gap"),
        ([1, 1, 1, 1], [-1, -1, 0, 1], "do not follow it without a gap"),
    ],
)
def test_segments_out_of_order_are_refused(
    lengths: list[int], parents: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tree_blocks(lengths, parents)


def test_a_shared_prefix_is_one_block_for_all_its_descendants() -> None:
    blocks = tree_blocks([5, 3, 2, 4, 6], [-1, 0, 1, 1, 0])
    assert [(b.q0, b.q1, b.k0, b.k1) for b in blocks if not b.causal] == [
        (5, 20, 0, 5),
        (8, 14, 5, 8),
    ]


def test_block_attention_passes_gradcheck() -> None:
    blocks = tree_blocks([2, 1, 2, 1], [-1, 0, 0, 2])
    given = inputs(6, 4, 2, torch.float64)
    assert torch.autograd.gradcheck(lambda q, k, v: _BlockAttention.apply(q, k, v, blocks), given)


def double(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def test_rms_norm_passes_gradcheck_and_agrees_with_torch() -> None:
    x, weight = double(3, 2, 8), double(8)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, RmsNorm(w, 1e-2)), (x, weight))
    expected = torch.nn.functional.rms_norm(x, (8,), weight, 1e-2)
    assert relative(rms_norm(x, RmsNorm(weight, 1e-2)), expected) < 1e-14


def test_rms_norm_of_bf16_is_bit_equal_to_transformers() -> None:
    norm = LlamaRMSNorm(64, 1e-5).to(torch.bfloat16)
    norm.weight.data.copy_(double(64))
    x = double(9, 64).to(torch.bfloat16)
    assert rms_norm(x, RmsNorm(norm.weight, 1e-5)).equal(norm(x))


@pytest.mark.parametrize(
    "fused_input", [SWIGLU, RmsNorm(torch.rand(10, dtype=torch.float64), 1e-2)]
)
def test_a_fused_input_is_recomputed_with_its_exact_gradient(fused_input: FusedInput) -> None:
    """Through a linear layer with an adapter, which keeps what goes into the fused input only."""
    x = double(3, 10)
    inner = fused_input(x.detach())
    layer = FrozenLinear.fuse({"q": (double(4, inner.shape[1]).detach(), None)})
    a, b = double(2, inner.shape[1]), double(4, 2)

    def apply(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_linear(
            layer, x, (Span(1, 3, 0.5, (LoraPart("q", a, b, 0, 4),), 0.0, 0),), fused_input
        )

    assert torch.autograd.gradcheck(apply, (x, a, b))
    assert torch.autograd.gradcheck(lambda x: lora_linear(layer, x, (), fused_input), (x,))
    with torch.no_grad():
        assert relative(apply(x, a, b), lora_linear(layer, inner, (), None) + torch.cat(
            [torch.zeros(1, 4, dtype=torch.float64), 0.5 * inner[1:] @ a.T @ b.T]
        )) < 1e-14  # fmt: skip


def test_swiglu_is_silu_of_the_gate_times_up() -> None:
    gate_up = double(3, 10)
    gate, up = gate_up.chunk(2, -1)
    assert relative(SWIGLU(gate_up), torch.nn.functional.silu(gate) * up) < 1e-14


def test_rotation_passes_gradcheck_and_turns_by_the_angle() -> None:
    x, angles = double(3, 2, 8), torch.linspace(0, 2, 12, dtype=torch.float64).view(3, 1, 4)
    cos_sin = (angles.cos() * 1.2, angles.sin() * 1.2)  # YaRN scales its rotations
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos_sin), (x,))
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(
        torch.full_like(angles, 1.2), angles
    )
    assert relative(rotate(x, cos_sin), torch.cat([turned.real, turned.imag], -1)) < 1e-14


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_lora_linear_passes_gradcheck_with_mixed_adapters(dropout: float) -> None:
    """Two adapters of different rank and scale, one twice, one on a part only, and base tokens."""
    weight, bias = double(7, 5).detach(), double(7).detach()
    layer = FrozenLinear.fuse({"q": (weight[:4], bias[:4]), "k": (weight[4:], bias[4:])})
    x, a1, b1, a2, b2, a3, b3 = (
        double(8, 5), double(2, 5), double(4, 2), double(2, 5), double(3, 2), double(3, 5),
        double(3, 3),
    )  # fmt: skip

    def apply(x: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, a3: Tensor, b3: Tensor):
        first = (LoraPart("q", a1, b1, 0, 4), LoraPart("k", a2, b2, 4, 7))
        spans = (
            Span(0, 3, 0.5, first, dropout, 1),
            Span(3, 5, 2.0, (LoraPart("k", a3, b3, 4, 7),), dropout, 2),
            Span(6, 8, 0.5, first, dropout, 3),
        )
        return lora_linear(layer, x, spans)

    assert torch.autograd.gradcheck(apply, (x, a1, b1, a2, b2, a3, b3))
