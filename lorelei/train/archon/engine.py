"""ArchonEngine: the torch-native train engine, alone or as one of several data-parallel ranks.

Shapes: T tokens, I items, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorelei.lora.bank import AdapterBank
from lorelei.model.attention import PackedAttention
from lorelei.model.decoder import Decoder
from lorelei.model.head import routed_target_logprobs, target_logprobs
from lorelei.parallel.ranks import Ranks
from lorelei.train.bank_engine import BankEngine
from lorelei.train.flat import blocks, item_tensors, spans, token_tensors
from lorelei.types import Batch


class ArchonEngine(BankEngine):
    """A BankEngine on the torch-native decoder."""

    def __init__(
        self,
        decoder: Decoder,
        max_tokens_per_mb: int = 1024,
        recompute: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__(_DecoderPasses(decoder, recompute), max_tokens_per_mb, ranks or Ranks())


class _DecoderPasses:
    """Implements Passes. Every rank has a whole decoder and waits for no other."""

    lockstep = False

    def __init__(self, decoder: Decoder, recompute: bool) -> None:
        self._decoder, self._recompute = decoder, recompute

    def make_bank(self) -> AdapterBank[Decoder]:
        return AdapterBank(self._decoder)

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
