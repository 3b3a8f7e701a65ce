"""The C kernels as functions of tensors.

Every function takes fp32 CPU tensors for which `fuses` is true. Shapes: T tokens, B rows,
D inputs, O outputs, F intermediate, H query heads, K key/value heads, d head size.
"""

from __future__ import annotations

import ctypes
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
    "product": (*(_POINTER, _LONG, _LONG) * 3, *(_LONG,) * 3, _FLOAT, ctypes.c_int),
    "add_low_rank": (_POINTER, _LONG, *(_POINTER,) * 4, *(_LONG,) * 5),
    "rms_norm": (_POINTER, _POINTER, _FLOAT, _POINTER, _LONG, _LONG),
    "rms_norm_backward": (_POINTER, _POINTER, _FLOAT, _POINTER, _POINTER, _LONG, _LONG),
    "swiglu": (_POINTER, _POINTER, _LONG, _LONG),
    "swiglu_backward": (_POINTER, _POINTER, _POINTER, _LONG, _LONG),
    "target_logprobs": (*(_POINTER,) * 5, _LONG, _LONG),
    "rotate": (_POINTER, _LONG, _POINTER, _POINTER, _FLOAT, _POINTER, *(_LONG,) * 4),
    "tree_forward": (*(_POINTER, _LONG) * 3, *(_POINTER,) * 5, *(_LONG,) * 5),
    "tree_backward": (*(_POINTER, _LONG) * 3, *(_POINTER,) * 9, *(_LONG,) * 5),
    "step_attention": (*(_POINTER, _LONG) * 3, *(_POINTER,) * 6, _LONG, _POINTER, *(_LONG,) * 5),
    "decode_step": (*(_POINTER,) * 6, _FLOAT, *(_POINTER,) * 7),
}


def fuses(x: Tensor) -> bool:
    """Whether there are kernels for tensors like this one."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and library() is not None


def whole_rows(x_THd: Tensor) -> Tensor:
    """x with the heads of a token contiguous; x may be a slice of a wider row."""
    return x_THd if x_THd.stride()[1:] == (x_THd.shape[2], 1) else x_THd.contiguous()


@cache
def _kernel(name: str) -> Any:
    kernel = getattr(library(), name)
    kernel.argtypes, kernel.restype = _SIGNATURES[name], _LONG if name == "lanes" else None
    return kernel


def _call(name: str, *values: Tensor | float) -> None:
    """Run a kernel; of a tensor it gets the address."""
    _kernel(name)(*(v.data_ptr() if isinstance(v, Tensor) else v for v in values))


@cache
def lanes() -> int:
    """The columns of a product come in multiples of this number."""
    count: int = _kernel("lanes")()
    return count


def pack(weight_OD: Tensor) -> Tensor:
    """The panels [O / P, D, P] of a matrix of any strides, padded with zeros."""
    (outputs, inputs), width = weight_OD.shape, 2 * lanes()
    panels = torch.empty(-(-outputs // width), inputs, width)
    _call("pack", weight_OD, *weight_OD.stride(), panels, outputs, inputs)
    return panels


def unpack(panels: Tensor, outputs: int) -> Tensor:
    """The matrix [O, D] of panels."""
    weight_OD = torch.empty(outputs, panels.shape[1])
    _call("unpack", panels, weight_OD, *weight_OD.shape)
    return weight_OD


def product(x_TD: Tensor, panels: Tensor, outputs: int, out: Tensor | None = None) -> Tensor:
    """x @ W.T [T, O] for the panels of W; out: contiguous memory for it."""
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    y_TO = torch.empty(len(x_TD), outputs) if out is None else out
    width = panels.shape[2]
    factors = (x_TD, *x_TD.stride(), panels, width, panels.stride(0))
    _call("product", *factors, y_TO, outputs, width, *x_TD.shape, outputs, 1.0, False)
    return y_TO


def transposed_product(x_TO: Tensor, panels: Tensor) -> Tensor:
    """x @ W [T, D] for the panels of W [O, D]."""
    x_TO = x_TO if x_TO.stride(1) == 1 else x_TO.contiguous()
    inputs, width = panels.shape[1:]
    y_TD = torch.empty(len(x_TO), inputs)
    transposed = torch.empty(_TRANSPOSE_ROWS, -(-inputs // width) * width)
    tensors = (x_TO, x_TO.stride(0), panels, transposed, y_TD)
    _call("transposed_product", *tensors, *x_TO.shape, inputs, _TRANSPOSE_ROWS)
    return y_TD


def with_lora_delta(panels: Tensor, a_DR: Tensor, b_RO: Tensor) -> Tensor:
    """The panels of W + (a @ b).T."""
    summed, width = panels.clone(), panels.shape[2]
    a_DR, deltas = a_DR.contiguous(), pack(b_RO.T)
    factors = (a_DR, *a_DR.stride(), deltas, width, deltas.stride(0))
    sums = (summed, width, summed.stride(0))
    _call("product", *factors, *sums, *a_DR.shape, len(panels) * width, 1.0, True)
    return summed


def multiplies(x_TD: Tensor, p_DO: Tensor) -> bool:
    """Whether `add_product` takes these factors."""
    return fuses(x_TD) and p_DO.stride(1) == 1 and p_DO.shape[1] % lanes() == 0


def add_product(y_TO: Tensor, x_TD: Tensor, p_DO: Tensor, scale: float, add: bool) -> None:
    """y = scale * x @ p, or added to y. Rows of y are contiguous, x may have any strides."""
    width = 2 * lanes()
    factors = (x_TD, *x_TD.stride(), p_DO, p_DO.stride(0), width)
    _call("product", *factors, y_TO, y_TO.stride(0), width, *x_TD.shape, p_DO.shape[1], scale, add)


def add_low_rank(y_TO: Tensor, x_TD: Tensor, a_DR: Tensor, panels: Tensor) -> None:
    """y += x @ a @ b for the panels of b.T. Rows of y are contiguous, R a multiple of `lanes`."""
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    rank, outputs = a_DR.shape[1], y_TO.shape[1]
    tensors = (x_TD, x_TD.stride(0), a_DR, panels, torch.empty(len(x_TD), rank))
    _call("add_low_rank", *tensors, y_TO, y_TO.stride(0), *x_TD.shape, rank, outputs)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] / rms(x) * weight [D]."""
    x, y = x.contiguous(), torch.empty(x.shape)
    _call("rms_norm", x, weight, eps, y, x.numel() // len(weight), len(weight))
    return y


def rms_norm_backward(x: Tensor, weight: Tensor, eps: float, dy: Tensor) -> Tensor:
    """The gradient of x [..., D]."""
    x, dy, dx = x.contiguous(), dy.contiguous(), torch.empty(x.shape)
    _call("rms_norm_backward", x, weight, eps, dy, dx, x.numel() // len(weight), len(weight))
    return dx


def swiglu(x_TF: Tensor) -> Tensor:
    """silu(gate) * up [T, F] of [T, 2F]."""
    x, y = x_TF.contiguous(), torch.empty(len(x_TF), x_TF.shape[1] // 2)
    _call("swiglu", x, y, *y.shape)
    return y


def swiglu_backward(x_TF: Tensor, dy_TF: Tensor) -> Tensor:
    """The gradient [T, 2F] of x."""
    x, dy, dx = x_TF.contiguous(), dy_TF.contiguous(), torch.empty(x_TF.shape)
    _call("swiglu_backward", x, dy, dx, *dy.shape)
    return dx


def target_logprobs(logits_TV: Tensor, target_T: Tensor, scale_T: Tensor) -> tuple[Tensor, Tensor]:
    """log p(target) and entropy [T] of softmax(logits * scale).

    The logits become the gradient of log p(target) with respect to them.
    """
    target_T, scale_T = target_T.contiguous(), scale_T.contiguous()
    logprobs_T, entropy_T = torch.empty(len(target_T)), torch.empty(len(target_T))
    tensors = (logits_TV, target_T, scale_T, logprobs_T, entropy_T)
    _call("target_logprobs", *tensors, *logits_TV.shape)
    return logprobs_T, entropy_T


def rotate(x_THd: Tensor, cos: Tensor, sin: Tensor, direction: float, out: Tensor) -> None:
    """Rotate x [T, H, d] into `out` by angles [T, d / 2], or back where direction is -1.

    Both may be parts of wider rows, and the same.
    """
    angles = (cos, sin, direction)
    _call("rotate", x_THd, x_THd.stride(0), *angles, out, out.stride(0), *x_THd.shape)


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


def step_attention(
    layer: int, q_BHd: Tensor, k_BKd: Tensor, v_BKd: Tensor, cache: StepCache, scratch: Tensor
) -> Tensor:
    """[B, H, d]; writes k and v into the cache. See kernels.c."""
    rows, heads, d = q_BHd.shape
    _, _, kv_heads, capacity, _ = cache.keys_LSKCd.shape
    out = torch.empty(rows, heads, d)
    held = (cache.keys_LSKCd[layer], cache.values_LSKCd[layer], cache.slots_B, cache.lengths_B)
    _call(
        "step_attention",
        *(*_factors(q_BHd, k_BKd, v_BKd), *held, cache.prompts_LB3[layer], scratch),
        *(scratch.numel() // (rows * kv_heads), out, rows, heads, kv_heads, capacity, d),
    )
    return out


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
    _call("decode_step", *tables, eps, *of_rows, cache.prompts_LB3, scratch, sizes)


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
    shape = _tree_shape(q_THd, k_TKd, trees)
    _call("tree_forward", *_factors(q_THd, k_TKd, v_TKd), *_tables(trees), out, lse, *shape)
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
    given = (*_factors(q_THd, k_TKd, v_TKd), *_tables(trees), out, lse, dout.contiguous())
    _call("tree_backward", *given, dq, dk, dv, *_tree_shape(q_THd, k_TKd, trees))
    tokens, kv_heads, d = k_TKd.shape
    dk, dv = (x.view(tokens, kv_heads, -1, d).sum(2) for x in (dk, dv))
    return dq, dk, dv


def _factors(*tensors: Tensor) -> tuple[Tensor | int, ...]:
    return tuple(value for x in tensors for value in (x, x.stride(0)))


def _tables(trees: Trees) -> tuple[Tensor, ...]:
    return trees.blocks_B4, trees.tree_bounds, trees.row_bounds


def _tree_shape(q_THd: Tensor, k_TKd: Tensor, trees: Trees) -> tuple[int, ...]:
    tokens, heads, d = q_THd.shape
    return len(trees.row_bounds) - 1, tokens, heads, k_TKd.shape[1], d
