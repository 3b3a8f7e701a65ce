"""The torch-native train engine, alone or as one of several data-parallel ranks.

Shapes: T tokens, I items, D hidden.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lorelei.lora.bank import AdapterBank
from lorelei.model.attention import PackedAttention
from lorelei.model.decoder import Decoder
from lorelei.model.head import routed_target_logprobs, target_logprobs
from lorelei.parallel.ranks import Ranks
from lorelei.train.adam import AdapterOptimizer
from lorelei.train.adapter_engine import AdapterEngine
from lorelei.train.mixed import blocks, item_tensors, run_mixed, spans, token_tensors
from lorelei.types import Batch


def archon_engine(
    decoder: Decoder,
    max_tokens_per_mb: int = 1024,
    recompute: bool = False,
    ranks: Ranks | None = None,
) -> AdapterEngine[AdapterBank[Decoder]]:
    """The engine on the torch-native decoder."""
    own = ranks or Ranks()
    return AdapterEngine(_DecoderPasses(decoder, recompute, max_tokens_per_mb, own), own)


class _DecoderPasses:
    """Implements Passes and MixedModel. Every rank has a whole decoder and waits for no other."""

    lockstep = False
    reports_outputs = True

    def __init__(self, decoder: Decoder, recompute: bool, max_tokens: int, ranks: Ranks) -> None:
        self._decoder, self._recompute = decoder, recompute
        self.max_tokens, self.ranks = max_tokens, ranks
        self.run = partial(run_mixed, self)

    def make_bank(self) -> AdapterBank[Decoder]:
        return AdapterBank(self._decoder)

    def make_optimizer(self, bank: AdapterBank[Decoder], name: str) -> AdapterOptimizer:
        return AdapterOptimizer(bank[name].tensors(), self.ranks)

    def item_logprobs(
        self, batch: Batch, bank: AdapterBank[Decoder], dropout_seed: int | None
    ) -> tuple[Tensor, Tensor]:
        decoder, route = bank.model(spans(batch, bank), dropout_seed)
        hidden_TD = decoder(
            *token_tensors(batch, decoder.device),
            route,
            PackedAttention(blocks(batch)),
            self._recompute,
        )
        source_I, target_I, temperature_I = item_tensors(batch.items, decoder.device)
        hidden_ID = hidden_TD[source_I]
        head = decoder.head
        if route.adapts(head):
            head_route = route.take(torch.from_numpy(batch.items.source))
            return routed_target_logprobs(hidden_ID, head, head_route, target_I, temperature_I)
        return target_logprobs(hidden_ID, head, target_I, temperature_I)

    def offload(self) -> None:
        """Nothing to free: on the CPU memory is one, on an accelerator adapters are small."""

    def onload(self) -> None:
        """Nothing to bring back."""
