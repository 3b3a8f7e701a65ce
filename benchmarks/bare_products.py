"""Every matrix product that a training pass needs, as plain torch.mm and torch.bmm calls.

Shapes: T tokens, D inputs, O outputs, R rank (of a layer's parts together), H heads, d head size,
n tokens of a segment, I items, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.part_clock import (
    ADAPTERS,
    ATTENTION_PROJECTIONS,
    ATTENTION_TOKENS,
    HEAD,
    MLP_PROJECTIONS,
)
from benchmarks.train_case import ADAPTER, SPEC
from lorelei.lora.bank import AdapterBank
from lorelei.lora.linear import LoraPart
from lorelei.model.attention import Block, tree_blocks
from lorelei.model.decoder import Decoder
from lorelei.model.head import CHUNK_ELEMENTS
from lorelei.types import Batch

Product = tuple[str, float, Callable[[], Tensor]]  # its part, how much of its time counts


class BareProducts:
    """The products of one micro-batch, with the model's own weights, over buffers made before.

    Of a causal block's products half the time counts, and its scores are computed once: a kernel
    that computes them again backward does more.
    """

    def __init__(self, model: Decoder, batch: Batch) -> None:
        self._buffers: dict[tuple[int, ...], list[Tensor]] = {}
        self._tokens = sum(len(s.tokens) for s in batch.segments)
        config, count = model.config, len(batch.items)
        blocks = tree_blocks(
            [len(s.tokens) for s in batch.segments], [s.parent for s in batch.segments]
        )
        bank = AdapterBank(model)
        bank.add(ADAPTER, SPEC)
        adapter = bank.lora(ADAPTER)
        forward: list[Product] = []
        backward: list[Product] = []
        for number, layer in enumerate(model.layers):
            groups = [
                (ATTENTION_PROJECTIONS, (layer.qkv, layer.out)),
                (MLP_PROJECTIONS, (layer.mlp.gate_up, layer.mlp.down)),
            ]
            for part, linears in groups:
                for one in linears:
                    dense = one.weight.dense()
                    # the embedding is frozen: the first layer gives its input no gradient
                    first = number == 0 and one is layer.qkv
                    forward.append((part, 1.0, self._mm(self._tokens, dense.T)))
                    backward += [] if first else [(part, 1.0, self._mm(self._tokens, dense))]
                    there, back = self._adapter(adapter.layers[one], first)
                    forward += there
                    backward += back
            there, back = self._attention(blocks, config.heads, config.head_dim)
            forward += there
            backward += back
        head = model.head.weight.dense()
        size = max(CHUNK_ELEMENTS // config.vocab, 1)
        chunks = [min(size, count - start) for start in range(0, count, size)]
        logits = [p for n in chunks for p in (self._mm(n, head.T), self._mm(n, head))]
        self._products = [*forward, *((HEAD, 1.0, p) for p in logits), *reversed(backward)]

    def seconds(self) -> dict[str, float]:
        """Of one round, by part."""
        found: dict[str, float] = {}
        for part, counts, product in self._products:
            start = time.perf_counter()
            product()
            found[part] = found.get(part, 0.0) + counts * (time.perf_counter() - start)
        return found

    def _mm(self, rows: int, right: Tensor) -> Callable[[], Tensor]:
        return self._product(torch.mm, self._buffer(rows, right.shape[0]), right)

    def _product(
        self, multiply: Callable[..., Tensor], left: Tensor, right: Tensor
    ) -> Callable[[], Tensor]:
        out = self._buffer(*left.shape[:-1], right.shape[-1], number=1)
        return lambda: multiply(left, right, out=out)

    def _adapter(
        self, parts: Sequence[LoraPart], first: bool
    ) -> tuple[list[Product], list[Product]]:
        """x @ A.T, low @ B.T; dy @ B, dy.T @ low, dlow.T @ x, dlow @ A. A of all parts is one."""
        tokens, a_RD = self._tokens, torch.cat([p.a.detach() for p in parts])
        low_TR, x_TD = (self._buffer(tokens, n) for n in a_RD.shape)
        there = [self._mm(tokens, a_RD.T)]
        back = [self._product(torch.mm, low_TR.T, x_TD)]
        if not first:
            back.append(self._mm(tokens, a_RD))
        for part in parts:
            b_OR = part.b.detach()
            there.append(self._mm(tokens, b_OR.T))
            back.append(self._mm(tokens, b_OR))
            dy_TO, low_TR = (self._buffer(tokens, n) for n in b_OR.shape)
            back.append(self._product(torch.mm, dy_TO.T, low_TR))
        return [(ADAPTERS, 1.0, p) for p in there], [(ADAPTERS, 1.0, p) for p in back]

    def _attention(
        self, blocks: Sequence[Block], heads: int, d: int
    ) -> tuple[list[Product], list[Product]]:
        """q @ k.T, p @ v; do @ v.T, p.T @ do, ds @ k, ds.T @ q, as whole squares."""
        there: list[Product] = []
        back: list[Product] = []
        for block in blocks:
            n, t = block.q1 - block.q0, block.k1 - block.k0
            q_Hnd, k_Htd = self._buffer(heads, n, d), self._buffer(heads, t, d)
            p_Hnt = self._buffer(heads, n, t)
            for products, left, right in (
                (there, q_Hnd, k_Htd.mT),
                (there, p_Hnt, k_Htd),
                (back, q_Hnd, k_Htd.mT),
                (back, p_Hnt.mT, q_Hnd),
                (back, p_Hnt, k_Htd),
                (back, p_Hnt.mT, q_Hnd),
            ):
                counts = 0.5 if block.causal else 1.0
                products.append((ATTENTION_TOKENS, counts, self._product(torch.bmm, left, right)))
        return there, back

    def _buffer(self, *shape: int, number: int = 0) -> Tensor:
        """Random numbers, the same tensor for the same shape; number 1: to write into."""
        held = self._buffers.setdefault(shape, [])
        while len(held) <= number:
            held.append(torch.randn(shape))
        return held[number]
