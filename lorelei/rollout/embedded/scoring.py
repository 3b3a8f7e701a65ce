"""Log-probabilities of given tokens.

Shapes: T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lorelei.model.attention import PackedAttention, tree_blocks
from lorelei.model.decoder import Decoder
from lorelei.rollout.embedded.published import PublishedAdapters
from lorelei.rollout.embedded.sampler import token_logprobs
from lorelei.types import Floats, Ints

_PACK_TOKENS = 4096  # of one forward pass
_LOGIT_ROWS = 128  # rows of [V] logits alive at a time


@torch.inference_mode()
def score(
    decoder: Decoder,
    published: PublishedAdapters,
    sequences: Sequence[Ints],
    adapter: str | None,
    temperature: float,
) -> list[Floats]:
    """[T - 1] log-probabilities of the tokens after the first, for every sequence."""
    scored: list[Floats] = []
    for pack in _packs(sequences):
        scored += _score_pack(decoder, published, pack, adapter, temperature)
    return scored


def _packs(sequences: Sequence[Ints]) -> list[list[Ints]]:
    packs: list[list[Ints]] = [[]]
    for sequence in sequences:
        if packs[-1] and sum(map(len, packs[-1])) + len(sequence) > _PACK_TOKENS:
            packs.append([])
        packs[-1].append(sequence)
    return packs if packs[-1] else []


def _score_pack(
    decoder: Decoder,
    published: PublishedAdapters,
    pack: Sequence[Ints],
    adapter: str | None,
    temperature: float,
) -> list[Floats]:
    device = decoder.device
    lengths = [len(sequence) for sequence in pack]
    tokens_T = torch.from_numpy(np.concatenate(pack)).long().to(device)
    hidden_TD = decoder(
        tokens_T,
        torch.cat([torch.arange(length, device=device) for length in lengths]),
        published.unmerged([(adapter, len(tokens_T))]),
        PackedAttention(tree_blocks(lengths, [-1] * len(lengths))),
    )
    # a token predicts the next one; the pack's very last predicts nothing
    pieces = [
        token_logprobs(
            published.unmerged([(adapter, len(hidden))])(decoder.head, hidden), targets, temperature
        )
        for hidden, targets in zip(
            hidden_TD[:-1].split(_LOGIT_ROWS), tokens_T[1:].split(_LOGIT_ROWS), strict=True
        )
    ]
    logprobs_T = torch.cat(pieces).float().cpu().numpy()
    starts = np.cumsum([0, *lengths[:-1]])
    return [logprobs_T[s : s + n - 1] for s, n in zip(starts.tolist(), lengths, strict=True)]
