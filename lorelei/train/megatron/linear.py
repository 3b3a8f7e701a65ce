"""What an adapter adds to one of Megatron's linear layers, under every kind of parallelism.

Collectives act on x A of rank R, never on x. Without sequence parallelism every gradient is whole
on every rank; with it, and in experts split over ranks, the gradients of tensors that are whole on
each rank are parts of a sum (see optimizer.py).
Shapes: ... tokens (and the batch of one), D inputs, O outputs, R rank; all of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import mappings
from torch import Tensor, nn

from lorelei.lora.linear import dropout_mask
from lorelei.lora.state import stable_seed
from lorelei.train.megatron.adapter import Adapter, Part, TargetLinear
from lorelei.train.megatron.mesh import MegatronMesh
from lorelei.train.megatron.row import Bound, Row


class AdaptedLinear:
    """A forward hook on a linear layer, which adds what the row's adapter adds."""

    def __init__(self, target: TargetLinear, mesh: MegatronMesh, bound: Bound) -> None:
        self._target, self._mesh, self._bound = target, mesh, bound
        split = target.style == "row" or (mesh.sequence_parallel and not target.expert)
        self._ordinal = target.shard if split else 0  # ranks with the same x draw the same mask
        target.module.register_forward_hook(self._hook)

    def _hook(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        row = self._bound.row
        if row is None or row.adapter is None or module not in row.adapter.targets:
            return None
        y, bias = output
        _, parts = row.adapter.targets[module]
        x = masked(
            args[0],
            row,
            row.adapter,
            (self._target.parts[0], self._ordinal, self._mesh.context.rank),
        )
        add = self._column if self._target.style == "column" else self._row
        return y + add(x, parts) * row.adapter.spec.scale, bias

    def _column(self, x: Tensor, parts: Sequence[Part]) -> Tensor:
        """[..., D] -> [..., O]."""
        a_RD, rows = stacked(parts, x.dtype)
        low = x @ a_RD.T
        tensor = self._mesh.tensor
        if not self._target.expert and tensor.size > 1:
            if self._mesh.sequence_parallel:
                low = mappings.gather_from_sequence_parallel_region(low, group=tensor.group)
            else:
                low = mappings.copy_to_tensor_model_parallel_region(low, group=tensor.group)
        outputs: list[Tensor | None] = [None] * len(self._target.parts)
        for part, at in zip(parts, rows, strict=True):
            outputs[part.number] = low[..., at] @ part.b.T.to(x.dtype)
        return self._fused(outputs)

    def _row(self, x: Tensor, parts: Sequence[Part]) -> Tensor:
        """[..., D] -> [..., O]."""
        (part,) = parts
        low = x @ part.a.T.to(x.dtype)
        tensor = self._mesh.tensor
        # experts that are split: their layer's outputs are parts of a sum, and so are these
        if not self._target.expert and tensor.size > 1:
            if self._mesh.sequence_parallel:
                low = mappings.reduce_scatter_to_sequence_parallel_region(low, group=tensor.group)
            else:
                low = mappings.reduce_from_tensor_model_parallel_region(low, group=tensor.group)
        return low @ part.b.T.to(x.dtype)

    def _fused(self, outputs: Sequence[Tensor | None]) -> Tensor:
        """The outputs of the parts in the order of the fused layer; zeros where there are none."""
        target = self._target
        some = next(o for o in outputs if o is not None)
        ahead = some.shape[:-1]
        blocks: list[Tensor] = []
        for output, width in zip(outputs, target.widths, strict=True):
            shape = (*ahead, target.groups, width // target.groups)
            blocks.append(some.new_zeros(shape) if output is None else output.view(shape))
        return torch.cat(blocks, dim=-1).flatten(-2)


def stacked(parts: Sequence[Part], dtype: torch.dtype) -> tuple[Tensor, list[slice]]:
    """Every A once, one under the other, and the rows of each part's."""
    rank = parts[0].a.shape[0]
    own = {id(part.a): part.a for part in parts}
    at = {key: slice(n * rank, (n + 1) * rank) for n, key in enumerate(own)}
    return torch.cat(list(own.values())).to(dtype), [at[id(part.a)] for part in parts]


def masked(x: Tensor, row: Row, adapter: Adapter, where: tuple[object, ...]) -> Tensor:
    """x with the adapter's dropout; the same mask every time, so a recomputed pass agrees."""
    dropout = adapter.spec.dropout
    if row.dropout_seed is None or dropout == 0:
        return x
    seed = stable_seed(adapter.seed, row.dropout_seed, *where)
    return x * dropout_mask(x, dropout, seed)
