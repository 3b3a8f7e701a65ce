"""Attention for transformers' modules: packed sequences that share prefixes and see no others.

Modules call it with queries, keys and values of a flat row of tokens; a pass hands it down to them
as the argument `attend`.

Shapes: T tokens, t of this process, H heads, K key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lorelei.model.attention import Block, PackedAttention
from lorelei.parallel.mesh import Axis
from lorelei.parallel.ulysses import to_heads, to_tokens

NAME = "lorelei"  # of the implementation, in transformers' registry


class Attend:
    """Attention of one micro-batch; the processes of `axis` each hold a part of its tokens."""

    def __init__(self, blocks: Sequence[Block], axis: Axis) -> None:
        self._blocks, self._packed, self._axis = tuple(blocks), PackedAttention(blocks), axis

    @cached_property
    def _longest(self) -> int:
        """Tokens of the longest sequence."""
        return max((len(_seen(own, self._blocks)) for own in self._blocks if own.causal), default=0)

    def __call__(
        self,
        q_tHd: Tensor,
        k_tKd: Tensor,
        v_tKd: Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """[t, H, d]. window: how many tokens back a query sees, itself included."""
        heads = q_tHd.shape[1]
        if self._axis.size > 1:
            k_tKd, v_tKd = (_shareable(x, heads, self._axis.size) for x in (k_tKd, v_tKd))
        q, k, v = (to_heads(x, self._axis) for x in (q_tHd, k_tKd, v_tKd))
        if window is not None and window >= self._longest:
            window = None
        if window is None and softcap is None and v.shape[-1] == q.shape[-1]:
            usual = q.shape[-1] ** -0.5
            q = q if scaling == usual else q * (scaling / usual)
            mixed = self._packed(0, q, k, v)
        else:
            mixed = _masked(q, k, v, self._blocks, scaling, window, softcap)
        return to_tokens(mixed, self._axis)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    attend: Attend | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: [1, H, t, d] each -> [1, t, H, d]. Raises ValueError (why not)."""
    name = type(module).__name__
    if attend is None:
        raise ValueError(f"model: {name} does not hand its arguments down to the attention")
    if attention_mask is not None or others.get("s_aux") is not None:
        raise ValueError(f"model: {name} needs masks or sinks that train.kind fsdp does not have")
    if not getattr(module, "is_causal", True):
        raise ValueError(f"model: the attention of {name} is not causal")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    factor = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return attend(q, k, v, factor, sliding_window, softcap)[None], None


ALL_ATTENTION_FUNCTIONS.register(NAME, attention)


def _shareable(x_tKd: Tensor, heads: int, size: int) -> Tensor:
    """Key/value heads that can be shared out; where they are too few, one for each query head."""
    kv_heads = x_tKd.shape[1]
    return x_tKd if kv_heads % size == 0 else x_tKd.repeat_interleave(heads // kv_heads, 1)


def _seen(own: Block, blocks: Sequence[Block]) -> list[int]:
    """The tokens of a segment's ancestors and its own, in the order of the sequence."""
    above = [b for b in blocks if not b.causal and b.q0 <= own.q0 and own.q1 <= b.q1]
    return [i for b in [*above, own] for i in range(b.k0, b.k1)]


def _masked(
    q_THd: Tensor,
    k_TKd: Tensor,
    v_TKd: Tensor,
    blocks: Sequence[Block],
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Segment by segment, for what the packed kernels cannot do."""
    groups = q_THd.shape[1] // k_TKd.shape[1]
    pieces: list[Tensor] = []
    for own in (b for b in blocks if b.causal):  # in the order of the tokens
        seen = torch.tensor(_seen(own, blocks), device=q_THd.device)
        length, total = own.q1 - own.q0, len(seen)
        q_Hnd = q_THd[own.q0 : own.q1].transpose(0, 1)
        k_Htd, v_Htd = (
            x[seen].repeat_interleave(groups, 1).transpose(0, 1) for x in (k_TKd, v_TKd)
        )
        at = torch.arange(total, device=q_THd.device)
        back_nt = at[total - length :, None] - at
        hidden_nt = back_nt < 0
        if window is not None:
            hidden_nt |= back_nt >= window
        if softcap is None:
            mixed = F.scaled_dot_product_attention(
                q_Hnd, k_Htd, v_Htd, attn_mask=~hidden_nt, scale=scaling
            )
        else:
            scores = q_Hnd @ k_Htd.transpose(1, 2) * scaling
            scores = torch.tanh(scores / softcap) * softcap
            scores = scores.masked_fill(hidden_nt, float("-inf"))
            wide = torch.promote_types(scores.dtype, torch.float32)
            mixed = scores.softmax(-1, dtype=wide).to(v_Htd.dtype) @ v_Htd
        pieces.append(mixed.transpose(0, 1))
    return torch.cat(pieces)
