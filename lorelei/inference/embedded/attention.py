"""`attend` of prefill and of one decoding step.

Shapes: T tokens (in a decoding step one a row), B rows, n rows of one prompt, H heads, K key/value
heads, d head size, t sampled tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorelei.inference.embedded.kv_cache import PromptCache, RowCache
from lorelei.model.attention import (
    PackedAttention,
    attention_with_lse,
    folded,
    tree_blocks,
    unfolded,
)
from lorelei.model.kernels import fused
from lorelei.model.kernels.fused import StepCache


class PrefillAttention:
    """Causal attention inside each of several packed prompts; fills their caches."""

    def __init__(self, lengths: Sequence[int], caches: Sequence[PromptCache]) -> None:
        self._packed = PackedAttention(tree_blocks(lengths, [-1] * len(lengths)))
        self._lengths, self._caches = list(lengths), caches

    def __call__(self, layer: int, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        pieces = zip(k_TKd.split(self._lengths), v_TKd.split(self._lengths), strict=True)
        for cache, (k, v) in zip(self._caches, pieces, strict=True):
            cache.keys[layer], cache.values[layer] = k.transpose(0, 1), v.transpose(0, 1)
        return self._packed(layer, q_THd, k_TKd, v_TKd)


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Rows [start, stop) of the step continue the same prompt."""

    start: int
    stop: int
    cache: PromptCache


class StepAttention:
    """Each row's new token looks at its prompt, at what the row sampled before, and at itself."""

    def __init__(
        self,
        cache: RowCache,
        groups: Sequence[PromptRows],
        slots_B: Tensor | None,
        lengths_B: Tensor,
        longest: int,
    ) -> None:
        """slots: the slot of each row; None: slot = row. lengths: tokens a row has cached."""
        rows, device = len(lengths_B), lengths_B.device
        self._cache, self._groups, self._slots = cache, groups, slots_B
        self._write_slots = torch.arange(rows, device=device) if slots_B is None else slots_B
        self._lengths, self._longest = lengths_B, longest + 1
        self._rows_by_slot = None if slots_B is None else slots_B.argsort()
        lengths_S = lengths_B if self._rows_by_slot is None else lengths_B[self._rows_by_slot]
        masked = torch.arange(self._longest, device=device) > lengths_S[:, None]
        self._mask = torch.zeros(masked.shape, device=device).masked_fill_(masked, -torch.inf)

    def __call__(self, layer: int, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        kv_heads = k_TKd.shape[1]
        self._cache.append(layer, self._write_slots, self._lengths, k_TKd, v_TKd)
        own, own_lse_BH = self._own(layer, q_THd, kv_heads)
        shared, shared_lse_BH = self._shared(layer, q_THd, kv_heads)
        share = torch.sigmoid(shared_lse_BH - own_lse_BH)[..., None]
        return own.lerp(shared, share.to(own.dtype))

    def _own(self, layer: int, q_BHd: Tensor, kv_heads: int) -> tuple[Tensor, Tensor]:
        """Attention over what each row sampled: [B, H, d] and its log-sum-exp [B, H]."""
        q_SHd = q_BHd if self._rows_by_slot is None else q_BHd[self._rows_by_slot]
        keys, values = self._cache.read(layer, len(q_SHd), self._longest)
        out, lse = attention_with_lse(
            q_SHd.unflatten(1, (kv_heads, -1)),
            keys,
            values,
            self._mask[:, None, None].to(q_BHd.dtype),
        )
        out, lse = out.reshape(q_SHd.shape), lse.reshape(q_SHd.shape[:2])
        return (out, lse) if self._slots is None else (out[self._slots], lse[self._slots])

    def _shared(self, layer: int, q_BHd: Tensor, kv_heads: int) -> tuple[Tensor, Tensor]:
        """The same over each row's prompt, read once for all rows of the prompt."""
        outs: list[Tensor] = []
        lses: list[Tensor] = []
        for group in self._groups:
            n = group.stop - group.start
            out, lse = attention_with_lse(
                folded(q_BHd[group.start : group.stop], kv_heads),
                group.cache.keys[layer][None],
                group.cache.values[layer][None],
            )
            outs.append(unfolded(out, n))
            lses.append(unfolded(lse[..., None], n)[..., 0])
        return torch.cat(outs), torch.cat(lses)


def step_cache(
    cache: RowCache, prompts_LB3: Tensor, slots_B: Tensor | None, lengths_B: Tensor, longest: int
) -> StepCache:
    """What kernels read. prompts: from `prompt_table`. The others are those of StepAttention."""
    slots_B = torch.arange(len(lengths_B)) if slots_B is None else slots_B
    scores = longest + 1 + int(prompts_LB3[0, :, 2].max())
    return StepCache(*cache.whole, slots_B, lengths_B, prompts_LB3, scores)


class FusedStepAttention:
    """StepAttention in one call a layer; see model.kernels."""

    def __init__(self, cache: StepCache) -> None:
        self._cache = cache
        self._scratch = torch.empty(0)

    def __call__(self, layer: int, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        if not len(self._scratch):
            self._scratch = torch.empty(q_THd.shape[0] * q_THd.shape[1] * (self._cache.scores + 1))
        return fused.step_attention(layer, q_THd, k_TKd, v_TKd, self._cache, self._scratch)


def prompt_table(groups: Sequence[PromptRows]) -> Tensor:
    """[L, B, 3]: the addresses of each row's prompt's keys and values in a layer, its length."""
    rows: list[tuple[int, int, int]] = []
    for group in groups:
        keys, values = group.cache.keys, group.cache.values
        rows += [(keys.data_ptr(), values.data_ptr(), keys.shape[2])] * (group.stop - group.start)
    layers, kv_heads, _, d = groups[0].cache.keys.shape
    table_LB3 = torch.tensor(rows).repeat(layers, 1, 1)
    layer_bytes_LB = torch.arange(layers)[:, None] * table_LB3[:, :, 2] * (4 * kv_heads * d)
    table_LB3[:, :, :2] += layer_bytes_LB[..., None]
    return table_LB3
