"""Rotary position embeddings: default, linear, llama3 and yarn.

Shapes: T tokens, H heads, d head size. Source: Su et al., 2021 (arXiv 2104.09864); YaRN: Peng et
al., 2023 (arXiv 2309.00071); llama3: the Llama 3.1 model card's frequency smoothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorelei.model.autograd import Function
from lorelei.model.config import DecoderConfig
from lorelei.model.kernels import fused


def frequencies(config: DecoderConfig) -> tuple[Tensor, float]:
    """Inverse frequencies [d / 2] (float32) and the factor on cos and sin."""
    rope, d = config.rope, config.head_dim
    # fp32 in the order of operations of transformers: at position 100000 one bit of a frequency
    # turns a query by a third of a degree
    periods = rope["rope_theta"] ** (torch.arange(0, d, 2, dtype=torch.float32) / d)
    inverse = 1.0 / periods
    match rope["rope_type"]:
        case "default":
            return inverse, 1.0
        case "linear":
            return inverse / rope["factor"], 1.0
        case "llama3":
            return _llama3(inverse, rope), 1.0
        case "yarn":
            return _yarn(periods, rope, d), _yarn_scale(rope)
        case other:
            raise AssertionError(f"rope_type {other!r} passed model.config")


def _llama3(inverse: Tensor, rope: Mapping[str, Any]) -> Tensor:
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] / (2 * math.pi / inverse)
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: unscaled, 0: fully scaled
    return (1 - keep) * inverse / rope["factor"] + keep * inverse


def _yarn(periods: Tensor, rope: Mapping[str, Any], d: int) -> Tensor:
    theta, original = rope["rope_theta"], rope["original_max_position_embeddings"]

    def dimension(rotations: float) -> float:
        return d * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    index = torch.arange(d // 2, dtype=torch.float32)
    keep = 1 - ((index - low) / max(high - low, 0.001)).clamp(0, 1)
    return 1.0 / (rope["factor"] * periods) * (1 - keep) + 1.0 / periods * keep


def _yarn_scale(rope: Mapping[str, Any]) -> float:
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]

    def scale(mscale: float) -> float:
        factor = rope["factor"]
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale(rope["mscale"]) / scale(rope["mscale_all_dim"])
    return scale(1.0)


class RotaryTable:
    """cos and sin of every position, computed once for the longest sequence seen."""

    def __init__(self, config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._inverse, self._scale = frequencies(config)
        self._dtype, self._device = dtype, device
        empty = torch.empty(0, config.head_dim // 2)
        self._cos_sin = (empty, empty)

    @property
    def table(self) -> tuple[Tensor, Tensor]:
        """cos and sin, read-only; a longer sequence brings new ones."""
        return self._cos_sin

    def at(self, positions_T: Tensor, longest: int | None = None) -> tuple[Tensor, Tensor]:
        """cos, sin [T, 1, d / 2] of the positions; longest: more than any of them, if known."""
        if longest is None:
            longest = int(positions_T.max()) + 1 if len(positions_T) else 0
        cos, sin = self._cos_sin
        if longest > len(cos):
            length = 1 << (longest - 1).bit_length()
            # fp32 angles whatever the model's dtype: position * frequency needs the mantissa
            angles = torch.arange(length, dtype=torch.float32)[:, None] * self._inverse
            cos = (angles.cos() * self._scale).to(self._device, self._dtype)
            sin = (angles.sin() * self._scale).to(self._device, self._dtype)
            self._cos_sin = (cos, sin)  # at once: training and decoding threads share the table
        return cos[positions_T][:, None], sin[positions_T][:, None]


def rotate(x_THd: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate queries or keys [T, H, d] by their positions' angles."""
    return _Rotate.apply(x_THd, *cos_sin)


def split_rotated(
    qkv_THd: Tensor, heads: int, kv_heads: int, cos_sin: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries and keys, and values, of a fused [T, H + 2 K, d]."""
    return _SplitRotated.apply(qkv_THd, heads, kv_heads, *cos_sin)


class _Rotate(Function):
    """Rotates back in the backward pass (a rotation's transpose), which needs the angles alone."""

    @staticmethod
    def forward(ctx: Any, x_THd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x_THd, cos, sin, 1.0, torch.empty_like(x_THd))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, sin, -1.0, torch.empty_like(grads[0])), None, None


class _SplitRotated(Function):
    """The three gradients are written into one tensor, where autograd would copy them together."""

    @staticmethod
    def forward(
        ctx: Any, qkv_THd: Tensor, heads: int, kv_heads: int, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        rotated = heads + kv_heads
        out = torch.empty_like(qkv_THd)
        _rotate(qkv_THd[:, :rotated], cos, sin, 1.0, out[:, :rotated])
        out[:, rotated:] = qkv_THd[:, rotated:]
        q, k, v = torch.split(out, [heads, kv_heads, kv_heads], dim=1)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        cos, sin = ctx.saved_tensors
        d_q, d_k, d_v = grads
        tokens, heads, d = d_q.shape
        kv_heads = d_k.shape[1]
        out = d_q.new_empty(tokens, heads + 2 * kv_heads, d)
        _rotate(d_q, cos, sin, -1.0, out[:, :heads])
        _rotate(d_k, cos, sin, -1.0, out[:, heads:-kv_heads])
        out[:, -kv_heads:] = d_v
        return out, None, None, None, None


def _rotate(x_THd: Tensor, cos: Tensor, sin: Tensor, direction: float, out: Tensor) -> Tensor:
    """Into `out`; direction: 1, or -1 for back."""
    if fused.fuses(x_THd):
        fused.rotate(fused.whole_rows(x_THd), cos, sin, direction, out)
        return out
    half = x_THd.shape[-1] // 2
    first, second = x_THd[..., :half], x_THd[..., half:]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin, value=direction)
    return out
