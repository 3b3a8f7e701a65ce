"""Draws one token a row and says how likely it was.

A token is found by inverting the cumulative distribution at one uniform number: sums of blocks
first, then inside one block, so nothing is sorted and no noise over the vocabulary is drawn.

Shapes: B rows, V vocabulary, S blocks of _BLOCK tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorelei.types import SamplingParams

_BLOCK = 256


def uniform_stream(seed: int, key: str, count: int) -> NDArray[np.float64]:
    """The first `count` numbers in [0, 1) of the stream named (seed, key); one for each token.

    Counter-based (Philox, Salmon et al., 2011), so a stream knows nothing of other requests.
    """
    name = hashlib.blake2b(f"{seed}\0{key}".encode(), digest_size=16).digest()
    bits = np.random.Philox(key=np.frombuffer(name, dtype=np.uint64))
    return np.random.Generator(bits).random(count)


@dataclass(frozen=True, slots=True)
class RowParams:
    """The sampling parameters of B rows as tensors."""

    inverse_temperature: Tensor | None  # [B, 1] fp64; None: all 1
    greedy: Tensor | None  # [n] row numbers; None: no row is greedy
    truncated: tuple[tuple[int, SamplingParams], ...]  # rows with top_k, top_p or min_p

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device) -> RowParams:
        # greedy rows report the temperature-1 distribution
        inverse = [1 / p.temperature if p.temperature > 0 else 1.0 for p in params]
        greedy = [i for i, p in enumerate(params) if p.temperature == 0]
        return cls(
            torch.tensor(inverse, dtype=torch.float64, device=device)[:, None]
            if set(inverse) != {1.0}
            else None,
            torch.tensor(greedy, device=device) if greedy else None,
            tuple((i, p) for i, p in enumerate(params) if p.temperature > 0 and _truncates(p)),
        )


def sample(
    logits_BV: Tensor, params: RowParams, uniforms_B: NDArray[np.float64]
) -> tuple[Tensor, Tensor]:
    """Tokens [B] and their log-probabilities [B] under the temperature-scaled full vocabulary.

    Truncation (top_k, top_p, min_p) decides what is drawn, never what is reported. The
    log-probability is NaN where logits are not finite. `logits_BV` is overwritten.
    """
    mass_BV = logits_BV.float() if logits_BV.dtype.itemsize < 4 else logits_BV
    best_B = logits_BV[params.greedy].argmax(-1) if params.greedy is not None else None
    mass_BV.sub_(mass_BV.amax(-1, keepdim=True))
    if params.inverse_temperature is not None:
        mass_BV.mul_(params.inverse_temperature.to(mass_BV.dtype))
    mass_BV.exp_()
    sums_BS = _block_sums(mass_BV)
    total_B = sums_BS.sum(-1)
    drawn_BV, drawn_sums = mass_BV, sums_BS
    if params.truncated:
        drawn_BV = mass_BV.clone()
        for row, row_params in params.truncated:
            drawn_BV[row] *= kept(mass_BV[row], row_params)
        drawn_sums = _block_sums(drawn_BV)
    uniforms = torch.from_numpy(uniforms_B).to(mass_BV.device)
    tokens_B = _invert(drawn_BV, drawn_sums, uniforms)
    if best_B is not None:
        tokens_B[params.greedy] = best_B
    chosen_B = mass_BV.gather(1, tokens_B[:, None])[:, 0].double()
    return tokens_B, (chosen_B.log() - total_B.log()).to(mass_BV.dtype)


def draw(mass_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """Tokens [B]: the inverse of each row's cumulative mass (not normalised) at a uniform."""
    return _invert(mass_BV, _block_sums(mass_BV), uniforms_B)


def _block_sums(mass_BV: Tensor) -> Tensor:
    """[B, S] fp64: fp32 inside a block (1e-7 relative), fp64 between blocks."""
    vocab = mass_BV.shape[1]
    whole = vocab - vocab % _BLOCK
    sums = mass_BV[:, :whole].unflatten(1, (-1, _BLOCK)).sum(-1)
    if whole < vocab:
        sums = torch.cat([sums, mass_BV[:, whole:].sum(-1, keepdim=True)], dim=1)
    return sums.double()


def _invert(mass_BV: Tensor, sums_BS: Tensor, uniforms_B: Tensor) -> Tensor:
    """The first token whose cumulative mass exceeds uniform * total; its mass is positive."""
    vocab = mass_BV.shape[1]
    ends_BS = sums_BS.cumsum(-1)
    target_B = uniforms_B * ends_BS[:, -1]
    block_B = _first_above(ends_BS, target_B)
    before_B = (ends_BS - sums_BS).gather(1, block_B[:, None])[:, 0]
    index = block_B[:, None] * _BLOCK + torch.arange(_BLOCK, device=mass_BV.device)
    inside = mass_BV.gather(1, index.clamp(max=vocab - 1)).double()
    inside.masked_fill_(index >= vocab, 0)
    return block_B * _BLOCK + _first_above(inside.cumsum(-1), target_B - before_B)


def _first_above(cumulative: Tensor, target_B: Tensor) -> Tensor:
    # rounding may put the target on the very end, behind which nothing is left to draw
    end = cumulative[:, -1]
    below_end = torch.minimum(target_B, torch.nextafter(end, torch.zeros_like(end)))
    return (cumulative <= below_end[:, None]).sum(-1).clamp_(max=cumulative.shape[1] - 1)


def _truncates(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def kept(mass_V: Tensor, params: SamplingParams) -> Tensor:
    """Which tokens may be drawn: top_k, of these the smallest set with top_p, of these min_p."""
    ordered, order = mass_V.double().sort(descending=True, stable=True)
    if params.top_k > 0:
        ordered[params.top_k :] = 0
    before = ordered.cumsum(0) - ordered
    kept = (before < params.top_p * ordered.sum()) & (ordered >= params.min_p * ordered[0])
    kept &= ordered > 0
    kept[0] = True
    return torch.zeros_like(kept).scatter_(0, order, kept)
