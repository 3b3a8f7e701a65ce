"""The C kernels as functions of tensors.

Every function takes fp32 CPU tensors for which `fuses` is true. Shapes: T tokens, B rows,
D inputs, O outputs, F intermediate, H query heads, K key/value heads, d head size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lorelei.model.kernels.build import library

_TRANSPOSE_ROWS = 192  # rows transposed per tile: they stay in the cache until multiplied
_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "lanes": (),
    "pack": (_POINTER, _LONG, _LONG, _POINTER, _LONG, _LONG),
    "unpack": (_POINTER, _POINTER, _LONG, _LONG),
    "transposed_product": (_POINTER, _LONG, *(_POINTER,) * 3, *(_LONG,) * 4),
    "product": (
        *(_POINTER, _LONG, _LONG) * 3,
        *(_LONG, _LONG, _LONG, _FLOAT, ctypes.c_int),
    ),
    "add_low_rank": (_POINTER, _LONG, *(_POINTER,) * 4, *(_LONG,) * 5),
    "rms_norm": (_POINTER, _POINTER, _FLOAT, _POINTER, _LONG, _LONG),
    "rms_norm_backward": (_POINTER, _POINTER, _FLOAT, _POINTER, _POINTER, _LONG, _LONG),
    "swiglu": (_POINTER, _POINTER, _LONG, _LONG),
    "swiglu_backward": (_POINTER, _POINTER, _POINTER, _LONG, _LONG),
    "target_logprobs": (*(_POINTER,) * 5, _LONG, _LONG),
    "rotate": (_POINTER, _LONG, _POINTER, _POINTER, _FLOAT, _POINTER, *(_LONG,) * 4),
    "tree_forward": (*(_POINTER, _LONG) * 3, *(_POINTER,) * 5, *(_LONG,) * 5),
    "tree_backward": (*(_POINTER, _LONG) * 3, *(_POINTER,) * 9, *(_LONG,) * 5),
    "step_attention": (
        *(_POINTER, _LONG) * 3,
        *(_POINTER,) * 6,
        _LONG,
        _POINTER,
        *(_LONG,) * 5,
    ),
    "decode_step": (*(_POINTER,) * 6, _FLOAT, *(_POINTER,) * 7),
}


def fuses(x: Tensor) -> bool:
    """Whether there are kernels for tensors like this one."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and library() is not None


def whole_rows(x_THd: Tensor) -> Tensor:
    """x with the heads of a token contiguous; x may be a slice of a wider row."""
    return x_THd if x_THd.stride()[1:] == (x_THd.shape[2], 1) else x_THd.contiguous()


@cache
def _kernel(name: str) -> Callable[..., Any]:
    kernel = getattr(library(), name)
    kernel.argtypes, kernel.restype = _SIGNATURES[name], _LONG if name == "lanes" else None
    return kernel


@cache
def lanes() -> int:
    """The columns of a product come in multiples of this number."""
    count: int = _kernel("lanes")()
    return count


def pack(weight_OD: Tensor) -> Tensor:
    """The panels [O / P, D, P] of a matrix of any strides, padded with zeros."""
    (outputs, inputs), width = weight_OD.shape, 2 * lanes()
    panels = torch.empty(-(-outputs // width), inputs, width)
    steps = weight_OD.stride()
    _kernel("pack")(weight_OD.data_ptr(), *steps, panels.data_ptr(), outputs, inputs)
    return panels


def unpack(panels: Tensor, outputs: int) -> Tensor:
    """The matrix [O, D] of panels."""
    weight_OD = torch.empty(outputs, panels.shape[1])
    _kernel("unpack")(panels.data_ptr(), weight_OD.data_ptr(), *weight_OD.shape)
    return weight_OD


def product(x_TD: Tensor, panels: Tensor, outputs: int, out: Tensor | None = None) -> Tensor:
    """x @ W.T [T, O] for the panels of W; out: contiguous memory for it."""
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    y_TO = torch.empty(len(x_TD), outputs) if out is None else out
    width = panels.shape[2]
    _kernel("product")(
        *(x_TD.data_ptr(), *x_TD.stride(), panels.data_ptr(), width, panels.stride(0)),
        *(y_TO.data_ptr(), outputs, width, *x_TD.shape, outputs, 1.0, False),
    )
    return y_TO


def transposed_product(x_TO: Tensor, panels: Tensor) -> Tensor:
    """x @ W [T, D] for the panels of W [O, D]."""
    x_TO = x_TO if x_TO.stride(1) == 1 else x_TO.contiguous()
    inputs, width = panels.shape[1:]
    y_TD = torch.empty(len(x_TO), inputs)
    transposed = torch.empty(_TRANSPOSE_ROWS, -(-inputs // width) * width)
    _kernel("transposed_product")(
        *(
            x_TO.data_ptr(),
            x_TO.stride(0),
            panels.data_ptr(),
            transposed.data_ptr(),
            y_TD.data_ptr(),
        ),
        *(*x_TO.shape, inputs, _TRANSPOSE_ROWS),
    )
    return y_TD


def with_lora_delta(panels: Tensor, a_DR: Tensor, b_RO: Tensor) -> Tensor:
    """The panels of W + (a @ b).T."""
    summed, width = panels.clone(), panels.shape[2]
    a_DR, deltas = a_DR.contiguous(), pack(b_RO.T)
    inputs, rank = a_DR.shape
    _kernel("product")(
        *(a_DR.data_ptr(), rank, 1, deltas.data_ptr(), width, deltas.stride(0)),
        *(summed.data_ptr(), width, summed.stride(0)),
        *(inputs, rank, len(panels) * width, 1.0, True),
    )
    return summed


def multiplies(x_TD: Tensor, p_DO: Tensor) -> bool:
    """Whether `add_product` takes these factors."""
    return fuses(x_TD) and p_DO.stride(1) == 1 and p_DO.shape[1] % lanes() == 0


def add_product(y_TO: Tensor, x_TD: Tensor, p_DO: Tensor, scale: float, add: bool) -> None:
    """y = scale * x @ p, or added to y. Rows of y are contiguous, x may have any strides."""
    width = 2 * lanes()
    _kernel("product")(
        *(x_TD.data_ptr(), *x_TD.stride(), p_DO.data_ptr(), p_DO.stride(0), width),
        *(y_TO.data_ptr(), y_TO.stride(0), width),
        *(*x_TD.shape, p_DO.shape[1], scale, add),
    )


def add_low_rank(y_TO: Tensor, x_TD: Tensor, a_DR: Tensor, panels: Tensor) -> None:
    """y += x @ a @ b for the panels of b.T. Rows of y are contiguous, R a multiple of `lanes`."""
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    (tokens, inputs), rank = x_TD.shape, a_DR.shape[1]
    low_TR = torch.empty(tokens, rank)
    _kernel("add_low_rank")(
        *(x_TD.data_ptr(), x_TD.stride(0), a_DR.data_ptr(), panels.data_ptr(), low_TR.data_ptr()),
        *(y_TO.data_ptr(), y_TO.stride(0), tokens, inputs, rank, y_TO.shape[1]),
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] / rms(x) * weight [D]."""
    x, y = x.contiguous(), torch.empty(x.shape)
    _kernel("rms_norm")(
        x.data_ptr(), weight.data_ptr(), eps, y.data_ptr(), x.numel() // len(weight), len(weight)
    )
    return y


def rms_norm_backward(x: Tensor, weight: Tensor, eps: float, dy: Tensor) -> Tensor:
    """The gradient of x [..., D]."""
    x, dy, dx = x.contiguous(), dy.contiguous(), torch.empty(x.shape)
    _kernel("rms_norm_backward")(
        *(x.data_ptr(), weight.data_ptr(), eps, dy.data_ptr(), dx.data_ptr()),
        *(x.numel() // len(weight), len(weight)),
    )
    return dx


def swiglu(x_TF: Tensor) -> Tensor:
    """silu(gate) * up [T, F] of [T, 2F]."""
    x, y = x_TF.contiguous(), torch.empty(len(x_TF), x_TF.shape[1] // 2)
    _kernel("swiglu")(x.data_ptr(), y.data_ptr(), *y.shape)
    return y


def swiglu_backward(x_TF: Tensor, dy_TF: Tensor) -> Tensor:
    """The gradient [T, 2F] of x."""
    x, dy, dx = x_TF.contiguous(), dy_TF.contiguous(), torch.empty(x_TF.shape)
    _kernel("swiglu_backward")(x.data_ptr(), dy.data_ptr(), dx.data_ptr(), *dy.shape)
    return dx


def target_logprobs(logits_TV: Tensor, target_T: Tensor, scale_T: Tensor) -> tuple[Tensor, Tensor]:
    """log p(target) and entropy [T] of softmax(logits * scale).

    The logits become the gradient of log p(target) with respect to them.
    """
    target_T, scale_T = target_T.contiguous(), scale_T.contiguous()
    logprobs_T, entropy_T = torch.empty(len(target_T)), torch.empty(len(target_T))
    tensors = (logits_TV, target_T, scale_T, logprobs_T, entropy_T)
    _kernel("target_logprobs")(*(t.data_ptr() for t in tensors), *logits_TV.shape)
    return logprobs_T, entropy_T


def rotate(x_THd: Tensor, cos: Tensor, sin: Tensor, direction: float, out: Tensor) -> None:
    """Rotate x [T, H, d] into `out` by angles [T, d / 2], or back where direction is -1.

    Both may be parts of wider rows, and the same.
    """
    _kernel("rotate")(
        *(x_THd.data_ptr(), x_THd.stride(0), cos.data_ptr(), sin.data_ptr(), direction),
        *(out.data_ptr(), out.stride(0), *x_THd.shape),
    )


def step_attention(
    q_BHd: Tensor,
    k_BKd: Tensor,
    v_BKd: Tensor,
    keys_SKCd: Tensor,
    values_SKCd: Tensor,
    slots_B: Tensor,
    lengths_B: Tensor,
    prompts_B3: Tensor,
    scratch: Tensor,
) -> Tensor:
    """[B, H, d]; writes k and v into the cache. See kernels.c."""
    rows, heads, d = q_BHd.shape
    _, kv_heads, capacity, _ = keys_SKCd.shape
    out = torch.empty(rows, heads, d)
    pointers = (keys_SKCd, values_SKCd, slots_B, lengths_B, prompts_B3, scratch)
    _kernel("step_attention")(
        *(q_BHd.data_ptr(), q_BHd.stride(0), k_BKd.data_ptr(), k_BKd.stride(0)),
        *(v_BKd.data_ptr(), v_BKd.stride(0), *(t.data_ptr() for t in pointers)),
        *(scratch.numel() // (rows * kv_heads), out.data_ptr()),
        *(rows, heads, kv_heads, capacity, d),
    )
    return out


@dataclass(frozen=True, slots=True)
class Blocks:
    """The addresses of what `decode_step` reads in each layer, whose tensors must outlive it.

    L layers, S spans of rows with an adapter; of a layer the products of q, k and v, of the
    attention's output, of gate and up, and down.
    """

    weights_L9: Tensor  # norms: input, q, k, mlp; panels of the four products; bias of q, k and v
    deltas_L4S3: Tensor  # a, the panels of b.T, the rank
    spans_S2: Tensor  # rows [start, stop)
    rank: int  # the largest


@dataclass(frozen=True, slots=True)
class StepCache:
    """Where the rows of a step have their keys and values; see `cached` in kernels.c."""

    keys_LSKCd: Tensor
    values_LSKCd: Tensor
    slots_B: Tensor
    lengths_B: Tensor
    prompts_LB3: Tensor
    scores: int  # of a query head, at most


def decode_step(
    x_BD: Tensor,
    blocks: Blocks,
    angles: tuple[Tensor, Tensor],
    cache: StepCache,
    eps: float,
    heads: int,
    intermediate: int,
) -> None:
    """x: embeddings of one token a row; becomes the hidden states before the last norm.

    angles: cosines and sines [B, 1, d / 2].
    """
    (rows, hidden), (layers, slots, kv, capacity, d) = x_BD.shape, cache.keys_LSKCd.shape
    each = heads // kv * (cache.scores + 1)
    width = hidden + 2 * (heads + kv) * d + 3 * intermediate + blocks.rank + kv * each
    scratch = torch.empty(rows * width)
    shape = (layers, rows, hidden, intermediate, heads, kv, d, slots, capacity)
    sizes = torch.tensor([*shape, len(blocks.spans_S2), blocks.rank, each])
    tables = (x_BD, blocks.weights_L9, blocks.deltas_L4S3, blocks.spans_S2, *angles)
    of_rows = (cache.keys_LSKCd, cache.values_LSKCd, cache.slots_B, cache.lengths_B)
    _kernel("decode_step")(
        *(t.data_ptr() for t in tables),
        eps,
        *(t.data_ptr() for t in (*of_rows, cache.prompts_LB3, scratch, sizes)),
    )


@dataclass(frozen=True, slots=True)
class Trees:
    """Which queries look at which keys of a packed row, tree by tree; see attention.c."""

    blocks_B4: Tensor
    tree_bounds: Tensor  # [R + 1] in blocks
    row_bounds: Tensor  # [R + 1] in tokens


def attends(q_THd: Tensor) -> bool:
    """Whether `tree_attention` takes such heads."""
    return fuses(q_THd) and q_THd.shape[2] % 64 == 0


def tree_attention(
    q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, trees: Trees
) -> tuple[Tensor, Tensor]:
    """[T, H, d] and the log-sum-exp [H, T]."""
    tokens, heads, _ = q_THd.shape
    out, lse = torch.empty(q_THd.shape), torch.empty(heads, tokens)
    _kernel("tree_forward")(
        *_factors(q_THd, k_TKd, v_TKd),
        *_bounds(trees),
        out.data_ptr(),
        lse.data_ptr(),
        *_tree_shape(q_THd, k_TKd, trees),
    )
    return out, lse


def tree_attention_backward(
    q_THd: Tensor,
    k_TKd: Tensor,
    v_TKd: Tensor,
    trees: Trees,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    dq, dk, dv = (torch.empty(q_THd.shape) for _ in range(3))
    pointers = (out, lse, dout.contiguous(), dq, dk, dv)
    _kernel("tree_backward")(
        *_factors(q_THd, k_TKd, v_TKd),
        *_bounds(trees),
        *(t.data_ptr() for t in pointers),
        *_tree_shape(q_THd, k_TKd, trees),
    )
    tokens, kv_heads, d = k_TKd.shape
    dk, dv = (x.view(tokens, kv_heads, -1, d).sum(2) for x in (dk, dv))
    return dq, dk, dv


def _factors(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(n for x in tensors for n in (x.data_ptr(), x.stride(0)))


def _bounds(trees: Trees) -> tuple[int, ...]:
    return trees.blocks_B4.data_ptr(), trees.tree_bounds.data_ptr(), trees.row_bounds.data_ptr()


def _tree_shape(q_THd: Tensor, k_TKd: Tensor, trees: Trees) -> tuple[int, ...]:
    tokens, heads, d = q_THd.shape
    return len(trees.row_bounds) - 1, tokens, heads, k_TKd.shape[1], d
