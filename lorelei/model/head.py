"""Log-probabilities of target tokens from hidden states, without ever holding [T, V] logits.

Shapes: I items, D hidden, V vocabulary, C items of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from lorelei.model.autograd import Function, checkpoint
from lorelei.model.backend import logits_factor
from lorelei.model.config import CHUNK_ELEMENTS
from lorelei.model.kernels import fused
from lorelei.model.linear import FrozenLinear, Route


def target_logprobs(
    hidden_ID: Tensor, head: FrozenLinear, target_I: Tensor, temperature_I: Tensor
) -> tuple[Tensor, Tensor]:
    """log p(target) and entropy [I] of softmax(logits / temperature), nats, at least fp32.

    The gradient of a log-probability with respect to its hidden state does not depend on the
    loss, so it is computed in the forward pass while the chunk's logits are in memory, and the
    backward pass multiplies it by one number an item. The entropy carries no gradient.
    """
    return TargetLogprobs.apply(hidden_ID, _Whole(head), target_I, temperature_I)


class Logits(Protocol):
    """The head of a model, whole or as one of the processes that share out the vocabulary."""

    @property
    def rows(self) -> int: ...  # tokens of the vocabulary that are here
    def sum_up(self, x: Tensor) -> Tensor: ...  # over the processes, perhaps in place
    def differentiate(
        self, hidden_CD: Tensor, target_C: Tensor, scale_C: Tensor, unit_CD: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """log p(target) and entropy [C] of softmax(logits * scale), in the scale's dtype.

        unit_CD: gets the gradient of log p(target) with respect to the hidden state.
        """
        ...


class TargetLogprobs(Function):
    """See target_logprobs."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ID: Tensor, head: Logits, target_I: Tensor, temperature_I: Tensor
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(hidden_ID.dtype, torch.float32)
        logprobs = torch.empty(len(target_I), dtype=dtype, device=hidden_ID.device)
        entropy = torch.empty_like(logprobs)
        unit_ID = torch.empty_like(hidden_ID) if ctx.needs_input_grad[0] else None
        for rows in chunks(len(target_I), head.rows, hidden_ID.device):
            scale_C = temperature_I[rows].to(dtype).reciprocal()
            unit_CD = None if unit_ID is None else unit_ID[rows]
            logprobs[rows], entropy[rows] = head.differentiate(
                hidden_ID[rows], target_I[rows], scale_C, unit_CD
            )
        if unit_ID is not None:
            ctx.save_for_backward(head.sum_up(unit_ID))
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (unit_ID,) = ctx.saved_tensors
        return unit_ID * grads[0][:, None].to(unit_ID.dtype), None, None, None


class _Whole:
    """Implements Logits."""

    def __init__(self, head: FrozenLinear) -> None:
        self._head = head
        self.rows = head.weight.shape[0]
        self._spare: Tensor | None = None  # fresh memory costs more than a softmax over it

    def differentiate(
        self, hidden_CD: Tensor, target_C: Tensor, scale_C: Tensor, unit_CD: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        out = None if self._spare is None else self._spare[: len(scale_C)]
        logits_CV = self._head.product(hidden_CD, out).to(scale_C.dtype)
        self._spare = logits_CV if fused.fuses(logits_CV) else None
        found = _differentiate(logits_CV, target_C, scale_C)
        if unit_CD is not None:
            slope_CV = logits_CV.to(hidden_CD.dtype)
            unit_CD.copy_(self._head.weight.transposed_product(slope_CV))
        return found

    def sum_up(self, x: Tensor) -> Tensor:
        return x


def _differentiate(logits_CV: Tensor, target_C: Tensor, scale_C: Tensor) -> tuple[Tensor, Tensor]:
    """log p(target) and entropy [C] of softmax(logits * scale).

    The logits become (onehot - p) * scale, the gradient of log p(target) with respect to them.
    """
    if fused.fuses(logits_CV):
        return fused.target_logprobs(logits_CV, target_C, scale_C)
    logits_CV.mul_(scale_C[:, None])
    picked = logits_CV.gather(1, target_C[:, None])[:, 0]
    lse = logits_CV.logsumexp(dim=-1)
    # sum p * logit = sum p * (logit - lse) + lse; p log p is written over a fresh buffer once
    logits_CV.sub_(lse[:, None])
    shifted = logits_CV.clone()
    logits_CV.exp_()
    entropy = -shifted.mul_(logits_CV).sum(-1)
    logits_CV.neg_()
    at = torch.arange(len(logits_CV), device=logits_CV.device)
    logits_CV[at, target_C] += 1
    logits_CV.mul_(scale_C[:, None])
    return picked - lse, entropy


def routed_target_logprobs(
    hidden_ID: Tensor,
    head: FrozenLinear,
    route: Route,
    target_I: Tensor,
    temperature_I: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same where an adapter acts on the head itself: chunks are recomputed in the backward."""
    logprobs: list[Tensor] = []
    entropies: list[Tensor] = []
    for rows in chunks(len(target_I), head.weight.shape[0], hidden_ID.device):
        index = torch.arange(rows.start, rows.stop, device=hidden_ID.device)
        logprob, entropy = checkpoint(
            _chunk_logprobs,
            hidden_ID[rows],
            head,
            route.take(index),
            target_I[rows],
            temperature_I[rows],
            use_reentrant=False,
        )
        logprobs.append(logprob)
        entropies.append(entropy.detach())
    return torch.cat(logprobs), torch.cat(entropies)


def _chunk_logprobs(
    hidden_CD: Tensor, head: FrozenLinear, route: Route, target_C: Tensor, temperature_C: Tensor
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(hidden_CD.dtype, torch.float32)
    logits_CV = route(head, hidden_CD).to(dtype) / temperature_C.to(dtype)[:, None]
    logprobs_CV = logits_CV.log_softmax(-1)
    entropy = -(logprobs_CV.exp() * logprobs_CV).sum(-1)
    return logprobs_CV.gather(1, target_C[:, None])[:, 0], entropy


def chunks(items: int, vocab: int, device: torch.device) -> Iterator[slice]:
    """Of items, so many that their logits over `vocab` tokens may be held at once."""
    size = max(CHUNK_ELEMENTS * logits_factor(device) // max(vocab, 1), 1)
    for start in range(0, items, size):
        yield slice(start, min(start + size, items))
