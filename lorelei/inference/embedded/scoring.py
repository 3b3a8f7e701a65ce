"""Log-probabilities of given tokens.

Shapes: T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lorelei.inference.embedded.published import PublishedAdapters
from lorelei.model.attention import PackedAttention, tree_blocks
from lorelei.model.head import routed_target_logprobs
from lorelei.types import Floats, Ints

_PACK_TOKENS = 4096  # of one forward pass


@torch.no_grad()
def score(
    published: PublishedAdapters,
    sequences: Sequence[Ints],
    adapter: str | None,
    temperature: float,
) -> list[Floats]:
    """[T - 1] log-probabilities of the tokens after the first, for every sequence.

    Never through a merged copy: what is said of a version does not depend on what is decoded.
    """
    decoder = published.decoder(adapter)
    scored: list[Floats] = []
    for pack in _packs(sequences):
        device, lengths = decoder.device, [len(sequence) for sequence in pack]
        tokens_T = torch.from_numpy(np.concatenate(pack)).long().to(device)
        route = published.unmerged([(adapter, len(tokens_T))])
        hidden_TD = decoder(
            tokens_T,
            torch.cat([torch.arange(length, device=device) for length in lengths]),
            route,
            PackedAttention(tree_blocks(lengths, [-1] * len(lengths))),
        )
        # every token predicts the next one of the pack; ends of sequences are cut out below
        logprobs_T, _ = routed_target_logprobs(
            hidden_TD[:-1],
            decoder.head,
            route.take(torch.arange(len(tokens_T) - 1, device=device)),
            tokens_T[1:],
            torch.full(
                (len(tokens_T) - 1,), temperature or 1.0, dtype=torch.float64, device=device
            ),
        )
        pieces = torch.cat([logprobs_T, logprobs_T.new_zeros(1)]).float().cpu().split(lengths)
        scored += [piece[:-1].numpy() for piece in pieces]
    return scored


def _packs(sequences: Sequence[Ints]) -> list[list[Ints]]:
    packs: list[list[Ints]] = []
    room = 0
    for sequence in sequences:
        if not packs or len(sequence) > room:
            packs.append([])
            room = _PACK_TOKENS
        packs[-1].append(sequence)
        room -= len(sequence)
    return packs
