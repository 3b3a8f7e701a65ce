"""Log-probabilities of target tokens from a vocabulary that is split over tensor-parallel ranks.

Shapes: I items, C items of one chunk, D hidden, V vocabulary of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lorelei.model.head import TargetLogprobs, chunks
from lorelei.parallel.mesh import Axis
from lorelei.train.megatron.adapter import Adapter, Part
from lorelei.train.megatron.linear import masked
from lorelei.train.megatron.mesh import MegatronMesh
from lorelei.train.megatron.row import Row


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """Implements model.head.Logits: W [V, D] of this rank's tokens, and the ranks with others."""

    weight: Tensor
    first: int  # token
    axis: Axis

    @property
    def rows(self) -> int:
        return self.weight.shape[0]

    def differentiate(
        self, hidden_CD: Tensor, target_C: Tensor, scale_C: Tensor, unit_CD: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        logits_CV = (hidden_CD @ self.weight.T).to(scale_C.dtype).mul_(scale_C[:, None])
        logprobs_C, entropy_C, slope_CV = _statistics(logits_CV, target_C, self)
        if unit_CD is not None:
            slope_CV.mul_(scale_C[:, None])
            unit_CD.copy_(slope_CV.to(hidden_CD.dtype) @ self.weight)
        return logprobs_C, entropy_C

    def sum_up(self, x: Tensor) -> Tensor:
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
    return TargetLogprobs.apply(hidden_ID, vocabulary, row.target_i, row.temperature_i)


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
    """The same from scaled logits, for which it gives a gradient."""

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
        return _OfLogits.apply(logits_CV, head, target)

    x = masked(hidden_ID, row, adapter, (part.name, ordinal))
    low_IR = x @ part.a.T.to(x.dtype)
    logprobs: list[Tensor] = []
    entropies: list[Tensor] = []
    # the items of a row may all be predicted on other ranks, and this one's pass must go on
    parts = [*chunks(len(hidden_ID), head.rows, hidden_ID.device)] or [slice(0)]
    for rows in parts:
        logprob, entropy = checkpoint(
            chunk,
            *(hidden_ID[rows], low_IR[rows], row.target_i[rows], row.temperature_i[rows]),
            use_reentrant=False,
        )
        logprobs.append(logprob)
        entropies.append(entropy.detach())
    return torch.cat(logprobs), torch.cat(entropies)
