"""Samples every row with its request's own random stream.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from lorelei.inference.embedded.sampler import draw, kept
from lorelei.types import SamplingParams

_WHOLE_VOCABULARY = 1 << 30  # SGLang's top_k of a request without one


def uniforms(seeds_B: Tensor, positions_B: Tensor) -> Tensor:
    """One number in [0, 1) of 53 bits for each (seed, position), both int64; fp64 [B].

    Counter-based: the splitmix64 finaliser (Steele et al., 2014) of seed + position * odd.
    """
    x = seeds_B + (positions_B.long() + 1) * -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ _shifted(x, shift)) * factor
    x = x ^ _shifted(x, 31)
    return _shifted(x, 11).double() * 2.0**-53


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Right by `bits`, zeros enter on the left."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def seed_of(request_id: str) -> int:
    """A seed for a request that names none."""
    digest = hashlib.blake2b(request_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def install() -> None:
    """Draw with our numbers, and give each batch the seeds of its requests."""
    from sglang.srt.layers.sampler import Sampler
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    def sample_from_probs(
        self: Any, probs: Tensor, sampling_info: Any, positions: Tensor, simple_sampling_case: bool
    ) -> tuple[Tensor, None]:
        mass_BV = probs if simple_sampling_case else _truncated(probs, sampling_info)
        tokens_B = draw(mass_BV, uniforms(sampling_info.sampling_seed, positions))
        return tokens_B.to(torch.int32), None

    made = SamplingBatchInfo.from_schedule_batch.__func__

    def from_schedule_batch(cls: Any, batch: Any, vocab_size: int) -> Any:
        info = made(cls, batch, vocab_size)
        named = [(request.sampling_params.sampling_seed, request.rid) for request in batch.reqs]
        seeds = [seed_of(rid) if seed is None else seed for seed, rid in named]
        # SGLang keeps them through merges and filters, but fills them in another mode only
        info.sampling_seed = torch.tensor(seeds, dtype=torch.int64).to(batch.device)
        return info

    SamplingBatchInfo.from_schedule_batch = classmethod(from_schedule_batch)
    Sampler._sample_from_probs = sample_from_probs


def _truncated(probs_BV: Tensor, info: Any) -> Tensor:
    """Zero what top-k, top-p and min-p leave out; a greedy row keeps its best token."""
    mass_BV = probs_BV.clone()
    rows = zip(info.top_ks.tolist(), info.top_ps.tolist(), info.min_ps.tolist(), strict=True)
    for row, (top_k, top_p, min_p) in enumerate(rows):
        if top_k <= 1:
            best = probs_BV[row].argmax()
            mass_BV[row] = 0
            mass_BV[row, best] = 1
        elif top_k < _WHOLE_VOCABULARY or top_p < 1 or min_p > 0:
            params = SamplingParams(
                top_k=0 if top_k >= _WHOLE_VOCABULARY else top_k, top_p=top_p, min_p=min_p
            )
            mass_BV[row] *= kept(probs_BV[row], params)
    return mass_BV
