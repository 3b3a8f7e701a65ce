"""Log-probabilities of target tokens from a vocabulary that is split over tensor-parallel ranks.

Shapes: I items, C items of one chunk, D hidden, V vocabulary of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lorelei.model.backend import logits_factor
from lorelei.model.head import CHUNK_ELEMENTS
from lorelei.parallel.mesh import Axis
from lorelei.train.megatron.adapter import Adapter, Part
from lorelei.train.megatron.linear import masked
from lorelei.train.megatron.mesh import MegatronMesh
from lorelei.train.megatron.row import Row


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """This rank's rows of the head: W [V, D], its first token, and the ranks with the others."""

    weight: Tensor
    first: int
    axis: Axis

    def sum_up(self, x: Tensor) -> Tensor:
        """Over the ranks, in place."""
        if self.axis.size > 1:
            dist.all_reduce(x, group=self.axis.group)
        return x

    def largest(self, x: Tensor) -> Tensor:
        """The maximum over the ranks, in place."""
        if self.axis.size > 1:
            dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.axis.group)
        return x


def item_logprobs(
    hidden: Tensor, row: Row, vocabulary: Vocabulary, module: torch.nn.Module, mesh: MegatronMesh
) -> tuple[Tensor, Tensor]:
    """log p(target) and entropy [I] of softmax(logits / temperature), nats; entropy: no gradient.

    hidden: [t, 1, D], of this rank's part of the sequence where that is split; I: the row's items
    that are predicted here.
    """
    if mesh.sequence_parallel:
        # what comes back is whole on every rank, of which each takes its own part
        hidden = mappings.gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=False, group=mesh.tensor.group
        )
    hidden_ID = hidden[:, 0].index_select(0, row.source_i)
    if row.adapter is not None and module in row.adapter.targets:
        _, (part,) = row.adapter.targets[module]
        return _adapted(hidden_ID, row, row.adapter, part, vocabulary, mesh.context.rank)
    return _TargetLogprobs.apply(hidden_ID, vocabulary, row.target_i, row.temperature_i)  # type: ignore[no-any-return]


class _TargetLogprobs(torch.autograd.Function):
    """The gradient with respect to a hidden state is computed while its logits are at hand."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ID: Tensor, head: Vocabulary, target_I: Tensor, temperature_I: Tensor
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(hidden_ID.dtype, torch.float32)
        logprobs = torch.empty(len(target_I), dtype=dtype, device=hidden_ID.device)
        entropy = torch.empty_like(logprobs)
        unit_ID = torch.zeros_like(hidden_ID) if ctx.needs_input_grad[0] else None
        for rows in _chunks(len(target_I), head.weight.shape[0], hidden_ID.device):
            scale_C = temperature_I[rows].to(dtype).reciprocal()
            logits_CV = (hidden_ID[rows] @ head.weight.T).to(dtype).mul_(scale_C[:, None])
            logprobs[rows], entropy[rows], slope_CV = _statistics(logits_CV, target_I[rows], head)
            if unit_ID is not None:
                slope_CV.mul_(scale_C[:, None])
                unit_ID[rows] = slope_CV.to(hidden_ID.dtype) @ head.weight
        if unit_ID is not None:
            ctx.save_for_backward(head.sum_up(unit_ID))
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (unit_ID,) = ctx.saved_tensors
        return unit_ID * grads[0][:, None].to(unit_ID.dtype), None, None, None


def _statistics(
    logits_CV: Tensor, target_C: Tensor, head: Vocabulary
) -> tuple[Tensor, Tensor, Tensor]:
    """log p(target) [C], entropy [C], and d log p(target) / d logits [C, V]; logits are used up."""
    count, size = logits_CV.shape
    lowest = torch.finfo(logits_CV.dtype).min
    top_C = logits_CV.amax(-1) if size else logits_CV.new_full((count,), lowest)
    top_C = head.largest(top_C)
    shifted = logits_CV.sub_(top_C[:, None])
    slope_CV = shifted.exp()
    local_C = target_C - head.first
    mine_C = (local_C >= 0) & (local_C < size)
    at = local_C.clamp(0, max(size - 1, 0))[:, None]
    picked_C = shifted.gather(1, at)[:, 0] * mine_C if size else shifted.new_zeros(count)
    sums = torch.stack([slope_CV.sum(-1), (slope_CV * shifted).sum(-1), picked_C])
    total_C, weighted_C, picked_C = head.sum_up(sums)
    log_total_C = total_C.log()
    slope_CV.div_(total_C[:, None]).neg_()
    if size:
        slope_CV.scatter_add_(1, at, mine_C[:, None].to(slope_CV.dtype))
    return picked_C - log_total_C, log_total_C - weighted_C / total_C, slope_CV


class _OfLogits(torch.autograd.Function):
    """The same from scaled logits that have a gradient of their own."""

    @staticmethod
    def forward(
        ctx: Any, logits_CV: Tensor, head: Vocabulary, target_C: Tensor
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropy, slope_CV = _statistics(logits_CV.clone(), target_C, head)
        ctx.save_for_backward(slope_CV)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slope_CV,) = ctx.saved_tensors
        return slope_CV * grads[0][:, None], None, None


def _adapted(
    hidden_ID: Tensor,
    row: Row,
    adapter: Adapter,
    part: Part,
    head: Vocabulary,
    ordinal: int,
) -> tuple[Tensor, Tensor]:
    """Where an adapter acts on the head itself: chunks are recomputed in the backward pass."""
    dtype = torch.promote_types(hidden_ID.dtype, torch.float32)

    def chunk(hidden: Tensor, low: Tensor, target: Tensor, heat: Tensor) -> tuple[Tensor, Tensor]:
        base = mappings.copy_to_tensor_model_parallel_region(hidden, group=head.axis.group)
        low = mappings.copy_to_tensor_model_parallel_region(low, group=head.axis.group)
        added = low @ part.b.T.to(low.dtype) * adapter.spec.scale
        logits_CV = (base @ head.weight.T + added).to(dtype) / heat.to(dtype)[:, None]
        return _OfLogits.apply(logits_CV, head, target)  # type: ignore[no-any-return]

    x = masked(hidden_ID, row, adapter, (part.name, ordinal))
    low_IR = x @ part.a.T.to(x.dtype)
    logprobs: list[Tensor] = []
    entropies: list[Tensor] = []
    for rows in _chunks(len(hidden_ID), head.weight.shape[0], hidden_ID.device):
        logprob, entropy = checkpoint(
            chunk,
            *(hidden_ID[rows], low_IR[rows], row.target_i[rows], row.temperature_i[rows]),
            use_reentrant=False,
        )
        logprobs.append(logprob)
        entropies.append(entropy.detach())
    return torch.cat(logprobs), torch.cat(entropies)


def _chunks(items: int, vocab: int, device: torch.device) -> Iterator[slice]:
    size = max(CHUNK_ELEMENTS * logits_factor(device) // max(vocab, 1), 1)
    for start in range(0, items, size):
        yield slice(start, min(start + size, items))
