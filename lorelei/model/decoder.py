"""The decoder: Llama, Qwen2, Qwen3 and Qwen3-MoE from one definition.

It runs on a flat row of tokens from any number of sequences: linear layers see all tokens at
once, `attend` alone knows which token may look at which, and `route` alone knows adapters. The
same code trains, prefills and decodes.

Shapes: T tokens, D hidden, H heads, K key/value heads, d head size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lorelei.model.autograd import checkpoint
from lorelei.model.config import DecoderConfig
from lorelei.model.linear import FrozenLinear, Route
from lorelei.model.mlp import Mlp, Moe
from lorelei.model.norm import RmsNorm, rms_norm
from lorelei.model.rope import RotaryTable, rotate, split_rotated


class Attend(Protocol):
    """Attention over what the caller holds: a packed batch, a prompt, a KV cache."""

    def __call__(self, layer: int, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, /) -> Tensor:
        """Rotated queries and keys, values -> [T, H, d]."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """The frozen tensors of one block."""

    input_norm: RmsNorm
    qkv: FrozenLinear
    q_norm: RmsNorm | None
    k_norm: RmsNorm | None
    out: FrozenLinear
    mlp_norm: RmsNorm
    mlp: Mlp | Moe


@dataclass(frozen=True, slots=True, eq=False)
class Decoder:
    """A frozen base model."""

    config: DecoderConfig
    embedding: Tensor  # [V, D]
    layers: tuple[Layer, ...]
    norm: RmsNorm
    head: FrozenLinear
    tied: bool  # the head multiplies with the embedding itself
    rotary: RotaryTable

    @property
    def architecture(self) -> str:
        return self.config.architecture

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def linears(self) -> list[FrozenLinear]:
        """Every linear layer that an adapter may target, in order of execution."""
        found: list[FrozenLinear] = []
        for layer in self.layers:
            mlps = layer.mlp.experts if isinstance(layer.mlp, Moe) else (layer.mlp,)
            found += [layer.qkv, layer.out, *(f for m in mlps for f in (m.gate_up, m.down))]
        return [*found, self.head]

    def __call__(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        route: Route,
        attend: Attend,
        recompute: bool = False,
        longest: int | None = None,
    ) -> Tensor:
        """Hidden states [T, D] after the last norm; logits are `route(self.head, hidden)`.

        recompute: keep only each block's input for the backward pass. longest: more than any
        position, which spares the device a look at them.
        """
        x_TD = F.embedding(tokens_T, self.embedding)
        angles = self.rotary.at(positions_T, longest)
        for number, layer in enumerate(self.layers):
            if recompute and torch.is_grad_enabled():
                # dropout masks are drawn from explicit seeds: there is no RNG state to restore
                x_TD = checkpoint(
                    self._block,
                    *(number, layer, x_TD, angles, route, attend),
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                x_TD = self._block(number, layer, x_TD, angles, route, attend)
        return rms_norm(x_TD, self.norm)

    def _block(
        self,
        number: int,
        layer: Layer,
        x_TD: Tensor,
        angles: tuple[Tensor, Tensor],
        route: Route,
        attend: Attend,
    ) -> Tensor:
        config = self.config
        qkv = route(layer.qkv, x_TD, layer.input_norm)
        heads, kv, d = config.heads, config.kv_heads, config.head_dim
        qkv_THd = qkv.view(len(x_TD), heads + 2 * kv, d)
        # the norms of Qwen3 act on each head before its rotation; without them, one function
        # rotates and splits, so that the backward pass writes one gradient of qkv and copies none
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k, v = torch.split(qkv_THd, [heads, kv, kv], dim=1)
            q = rotate(rms_norm(q, layer.q_norm), angles)
            k = rotate(rms_norm(k, layer.k_norm), angles)
        else:
            q, k, v = split_rotated(qkv_THd, heads, kv, angles)
        mixed_THd = attend(number, q, k, v)
        # not +=: the backward pass of the norm above reads x_TD
        x_TD = x_TD + route(layer.out, mixed_THd.reshape(len(x_TD), heads * d))
        return x_TD + layer.mlp(x_TD, route, layer.mlp_norm)
