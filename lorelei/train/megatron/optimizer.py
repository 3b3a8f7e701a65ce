"""AdamW of one adapter over many ranks, each step a few collectives over flat buffers.

Tensors of dense layers stand in one buffer, those of experts in another, because other ranks
repeat them. With a distributed optimizer each of the ranks that repeat a buffer keeps the moments
of, and steps, a slice of its own.
Shapes: N elements of a buffer, padding included; n of this rank's slice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lorelei.parallel.mesh import Axis
from lorelei.train.adam import AdapterOptimizer
from lorelei.train.megatron.adapter import Shard
from lorelei.train.megatron.collect import collect
from lorelei.train.megatron.mesh import MegatronMesh
from lorelei.types import AdamHyper, OptimStats


class Buffer:
    """Shards of one kind, one after another; the live tensors become views of it.

    First those whose gradients are parts of a sum over the ranks of `splitting`, then the others
    that these ranks have whole, then those that are split over them.
    """

    def __init__(self, shards: Sequence[Shard], splitting: Axis, repeating: Axis, slices: int):
        self.shards = sorted(shards, key=lambda s: (not s.partial, s.axis is not None, s.names))
        self._splitting, self._repeating, self._slices = splitting, repeating, slices
        counts = [s.tensor.numel() for s in self.shards]
        self._partial = sum(n for n, s in zip(counts, self.shards, strict=True) if s.partial)
        self._whole = sum(n for n, s in zip(counts, self.shards, strict=True) if s.axis is None)
        size = sum(counts)
        device = shards[0].tensor.device
        self._flat_N = torch.zeros(size + -size % slices, device=device)
        length = len(self._flat_N) // slices
        rank = repeating.rank if slices > 1 else 0
        self._at = slice(rank * length, (rank + 1) * length)
        self.own_n = self._flat_N[self._at]
        for shard, piece in zip(self.shards, self.pieces(self._flat_N), strict=True):
            piece.copy_(shard.tensor.detach())
            shard.tensor.data = piece

    def pieces(self, flat_N: Tensor) -> list[Tensor]:
        """Views of the shards in a buffer laid out like this one."""
        counts = [s.tensor.numel() for s in self.shards]
        parts = flat_N[: sum(counts)].split(counts)
        return [p.view(s.tensor.shape) for p, s in zip(parts, self.shards, strict=True)]

    def take_gradients(self) -> None:
        """Sum the shards' gradients over all ranks that add to them, into the slice's gradient."""
        grad_N = torch.zeros_like(self._flat_N)
        for shard, piece in zip(self.shards, self.pieces(grad_N), strict=True):
            if shard.tensor.grad is not None:
                piece.copy_(shard.tensor.grad)
        self.clear()
        if self._partial and self._splitting.size > 1:
            dist.all_reduce(grad_N[: self._partial], group=self._splitting.group)
        if self._slices > 1:
            own_n = torch.empty_like(self.own_n)
            dist.reduce_scatter_tensor(own_n, grad_N, group=self._repeating.group)
            grad_N = own_n
        elif self._repeating.size > 1:
            dist.all_reduce(grad_N, group=self._repeating.group)
        self.own_n.grad = grad_N

    def squares(self) -> Tensor:
        """The sum of squares of the gradients that this rank counts: each element is counted once
        in the whole world.
        """
        grad_n = self.own_n.grad
        assert grad_n is not None, "take_gradients comes first"
        if self._slices == 1 and self._repeating.rank > 0:
            return grad_n.new_zeros(())
        # what the ranks of `splitting` have whole, the first of them counts
        skipped = self._whole if self._splitting.rank > 0 else 0
        return grad_n[max(skipped - self._at.start, 0) :].square().sum()

    def clear(self) -> None:
        """Drop the gradients of the shards."""
        for shard in self.shards:
            shard.tensor.grad = None

    def spread(self) -> None:
        """After a step: give the others this rank's slice, and take theirs."""
        if self._slices > 1:
            dist.all_gather_into_tensor(
                self._flat_N, self.own_n.clone(), group=self._repeating.group
            )

    def whole(self, own_n: Tensor) -> list[Tensor]:
        """Moments of the shards, from every rank's moments of its slice."""
        flat_N = own_n
        if self._slices > 1:
            flat_N = torch.empty_like(self._flat_N)
            dist.all_gather_into_tensor(
                flat_N, own_n.to(flat_N.device), group=self._repeating.group
            )
        return self.pieces(flat_N)

    def slice(self, full: Mapping[str, Tensor]) -> Tensor:
        """This rank's slice of full tensors by PEFT name."""
        flat_N = torch.zeros_like(self._flat_N)
        for shard, piece in zip(self.shards, self.pieces(flat_N), strict=True):
            piece.copy_(shard.of(full[shard.names[0]]))
        return flat_N[self._at]


class ShardedOptimizer:
    """Implements adapter_engine.Optimizer. Every rank gets every call."""

    def __init__(
        self,
        shards: Sequence[Shard],
        mesh: MegatronMesh,
        distributed: bool,
        device: torch.device,
    ) -> None:
        self._mesh, self._device = mesh, device
        self._buffers: dict[str, Buffer] = {}
        for kind, expert in (("dense", False), ("expert", True)):
            repeating = mesh.repeating(expert)
            slices = repeating.size if distributed else 1
            if own := [s for s in shards if s.target.expert == expert]:
                self._buffers[kind] = Buffer(own, mesh.splitting(expert), repeating, slices)
        held = {kind: buffer.own_n for kind, buffer in self._buffers.items()}
        # a pipeline stage may have no layer that is adapted
        self._adam = AdapterOptimizer(held) if held else None
        self.step_count = 0

    def grad_norm(self) -> Tensor:
        """Sum the gradients over the ranks. Returns their norm over all ranks."""
        squares = torch.zeros((), device=self._device)
        for buffer in self._buffers.values():
            buffer.take_gradients()
            squares += buffer.squares()
        if dist.get_world_size() > 1:
            dist.all_reduce(squares)
        return squares.sqrt()

    def step(self, hyper: AdamHyper, norm: Tensor) -> OptimStats:
        """Clip from `norm` to hyper.max_grad_norm; step; clear."""
        if self._adam is not None:
            self._adam.step(hyper, norm)
        for buffer in self._buffers.values():
            buffer.spread()
        self.step_count += 1
        return OptimStats(grad_norm=norm.item(), step=self.step_count)

    def clear(self) -> None:
        """Drop all gradients."""
        for buffer in self._buffers.values():
            buffer.clear()
        if self._adam is not None:
            self._adam.clear()

    def moments(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Copies of (exp_avg, exp_avg_sq) by PEFT name, full on the first rank."""
        own = ({}, {}) if self._adam is None else self._adam.moments()
        exp_avg, exp_avg_sq = map(self._of_shards, own)
        return collect(exp_avg, self._mesh), collect(exp_avg_sq, self._mesh)

    def _of_shards(self, flat: Mapping[str, Tensor]) -> dict[Shard, Tensor]:
        found: dict[Shard, Tensor] = {}
        for kind, buffer in self._buffers.items():
            found.update(zip(buffer.shards, buffer.whole(flat[kind]), strict=True))
        return found

    def restore(
        self, exp_avg: Mapping[str, Tensor], exp_avg_sq: Mapping[str, Tensor], step: int
    ) -> None:
        """Replace moments, full by PEFT name, and the step count; drop all gradients."""
        self.clear()
        self.step_count = step
        if self._adam is not None:
            self._adam.restore(
                {kind: buffer.slice(exp_avg) for kind, buffer in self._buffers.items()},
                {kind: buffer.slice(exp_avg_sq) for kind, buffer in self._buffers.items()},
                step,
            )
