"""The fused kernels against the operations of torch that they replace."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorelei.model import head
from lorelei.model.backend import LowRank
from lorelei.model.kernels import fused
from lorelei.model.kernels.build import library
from lorelei.model.linear import FrozenLinear
from lorelei.model.mlp import SWIGLU
from lorelei.model.norm import RmsNorm

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler for the kernels here")

ODD_SHAPES = [(1, 8), (3, 33), (40, 576), (129, 130)]


def test_where_a_compiler_is_fp32_on_the_cpu_uses_the_kernels_and_fp64_does_not() -> None:
    assert fused.fuses(torch.empty(1))
    assert not fused.fuses(torch.empty(1, dtype=torch.float64))
    assert not fused.fuses(torch.empty(1, dtype=torch.bfloat16))


@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_a_norm_and_its_gradient_are_those_of_fp64(shape: tuple[int, int]) -> None:
    x, dy, weight = torch.randn(shape), torch.randn(shape), torch.rand(shape[1]) + 0.5
    exact = RmsNorm(weight.double(), 1e-5)
    assert_close(RmsNorm(weight, 1e-5)(x), exact(x.double()))
    assert_close(RmsNorm(weight, 1e-5).backward(x, dy), exact.backward(x.double(), dy.double()))


@pytest.mark.parametrize("shape", [(t, 2 * d) for t, d in ODD_SHAPES])
@pytest.mark.parametrize("spread", [1.0, 60.0])
def test_the_gated_product_and_its_gradient_are_those_of_fp64(
    shape: tuple[int, int], spread: float
) -> None:
    x, dy = torch.randn(shape) * spread, torch.randn(shape[0], shape[1] // 2)
    assert_close(SWIGLU(x), SWIGLU(x.double()))
    assert_close(SWIGLU.backward(x, dy), SWIGLU.backward(x.double(), dy.double()))


@pytest.mark.parametrize("shape", [*ODD_SHAPES, (2, 49152)])
@pytest.mark.parametrize("spread", [0.1, 4.0, 300.0])
def test_target_logprobs_entropy_and_gradient_are_those_of_fp64(
    shape: tuple[int, int], spread: float
) -> None:
    logits = torch.randn(shape) * spread
    target, scale = torch.randint(shape[1], shape[:1]), torch.rand(shape[0]) + 0.5
    exact = logits.double().requires_grad_()
    all_TV = (exact * scale[:, None]).log_softmax(-1)
    logprobs = all_TV.gather(1, target[:, None])[:, 0]
    (gradient,) = torch.autograd.grad(logprobs.sum(), exact)
    given = fused.target_logprobs(logits, target, scale)
    entropy = -(all_TV.exp() * all_TV).sum(-1).detach()
    # those of an almost certain token are nearly nothing, and differences of larger numbers
    for found, expected in zip(
        (*given, logits), (logprobs.detach(), entropy, gradient), strict=True
    ):
        torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-6)


def test_chunks_of_logits_that_share_memory_are_those_of_fp64(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 3 * 50)  # 8 tokens: 3, 3 and 2
    hidden, weight, target = torch.randn(8, 16), torch.randn(50, 16), torch.randint(50, (8,))

    def found(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaf = hidden.to(dtype).requires_grad_()
        layer = FrozenLinear.fuse({"lm_head": (weight.to(dtype), None)})
        logprobs, entropy = head.target_logprobs(leaf, layer, target, torch.full((8,), 0.7))
        (gradient,) = torch.autograd.grad(logprobs.sum(), leaf)
        return logprobs.detach(), entropy, gradient

    for given, exact in zip(found(torch.float32), found(torch.float64), strict=True):
        assert_close(given, exact)


@pytest.mark.parametrize("tokens", [1, 3, 150])
@pytest.mark.parametrize("shape", [*ODD_SHAPES, (64, 96), (65, 31), (400, 100)])
def test_a_product_with_a_transposed_matrix_is_that_of_fp64(
    tokens: int, shape: tuple[int, int]
) -> None:
    x, weight = torch.randn(tokens, shape[0] + 7)[:, 7:], torch.randn(shape)
    found = fused.transposed_product(x, fused.pack(weight))
    assert_close(found, x.double() @ weight.double())


@pytest.mark.parametrize("tokens", [1, 3, 40, 130])
@pytest.mark.parametrize("rank", [3, 16, 48])
@pytest.mark.parametrize("outputs", [31, 64, 960])
def test_a_low_rank_product_is_added_as_in_fp64(tokens: int, rank: int, outputs: int) -> None:
    x, y = torch.randn(tokens, 100)[:, 7:40], torch.randn(tokens, outputs)
    a, b = torch.randn(33, rank), torch.randn(rank, outputs)
    exact = y.double() + x.double() @ a.double() @ b.double()
    LowRank.of(a, b).add_to(y, x)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-4)


def test_values_that_are_not_numbers_stay_visible() -> None:
    x = torch.randn(4, 16)
    x[1, 3] = torch.nan
    assert SWIGLU(x).isnan().any(1).tolist() == [False, True, False, False]
    assert RmsNorm(torch.ones(16), 1e-5)(x).isnan().any(1).tolist() == [False, True, False, False]
    nowhere = torch.full((1, 1, 8), torch.nan)
    mixed = step_attention(nowhere, torch.ones(1, 1, 8), torch.ones(1, 1, 8), [0])
    assert mixed.isnan().all()


@pytest.mark.parametrize("d", [8, 24, 64, 80, 128])
def test_step_attention_is_attention_over_prompt_and_own_tokens(d: int) -> None:
    torch.manual_seed(d)
    rows, heads, kv_heads = 5, 6, 2
    q, k, v = (torch.randn(rows, n, d) for n in (heads, kv_heads, kv_heads))
    assert_close(*pair(q, k, v, lengths=[0, 3, 1, 7, 5], prompt_lengths=[4, 4, 1, 19, 19]))


def test_step_attention_survives_scores_of_any_size() -> None:
    q, k, v = (300 * torch.randn(3, n, 8) for n in (2, 1, 1))
    assert_close(*pair(q, k, v, lengths=[2, 0, 6], prompt_lengths=[3, 3, 3]))


def pair(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], prompt_lengths: list[int]
) -> tuple[Tensor, Tensor]:
    """What the kernel gives and what fp64 softmax gives, with rows in shuffled slots."""
    rows, heads, d = q.shape
    kv_heads, capacity = k.shape[1], max(lengths) + 2
    slots = torch.randperm(rows + 1)[:rows]
    cache = torch.randn(2, rows + 1, kv_heads, capacity, d)
    prompts = {p: torch.randn(2, kv_heads, p, d) for p in sorted(set(prompt_lengths))}
    table = [(prompts[p][0].data_ptr(), prompts[p][1].data_ptr(), p) for p in prompt_lengths]
    expected = torch.empty(q.shape, dtype=torch.float64)
    for b, (n, p) in enumerate(zip(lengths, prompt_lengths, strict=True)):
        own = torch.stack([k[b], v[b]])[:, :, None]
        held = torch.cat([prompts[p], cache[:, slots[b], :, :n], own], dim=2).double()
        keys, values = held.repeat_interleave(heads // kv_heads, 1)
        expected[b] = F.scaled_dot_product_attention(q[b, :, None].double(), keys, values)[:, 0]
    scores = max(lengths) + max(prompt_lengths) + 1
    tables = (slots, torch.tensor(lengths), torch.tensor([table]))
    held = fused.StepCache(cache[0][None], cache[1][None], *tables, scores)
    scratch = torch.empty(rows * heads * (scores + 1))
    given = fused.step_attention(0, q, k, v, held, scratch)
    for b, n in enumerate(lengths):
        assert torch.equal(cache[0, slots[b], :, n], k[b])
        assert torch.equal(cache[1, slots[b], :, n], v[b])
    return given, expected


def step_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    return pair(q, k, v, lengths, [2] * len(q))[0]


def assert_close(given: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(
        given.double(), exact, rtol=2e-5, atol=2e-6 * exact.abs().max().item()
    )
