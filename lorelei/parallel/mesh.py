"""Which part of the model and of the work each process of an engine has."""
# pyright: reportUnknownMemberType=false
# torch.distributed declares no types

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One kind of parallelism: which of the processes that share in it this one is."""

    rank: int
    size: int
    group: dist.ProcessGroup | None  # None: this process alone

    def part(self, length: int) -> tuple[int, int]:
        """[start, stop) of this process's equal part."""
        assert length % self.size == 0, f"{length} over {self.size}"
        each = length // self.size
        return self.rank * each, (self.rank + 1) * each


ALONE = Axis(rank=0, size=1, group=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """data x sequence x tensor parallel processes, the last ones neighbours.

    The frozen base is sharded over data and sequence: those processes multiply with the same
    matrices.
    """

    shards: DeviceMesh | None  # over which the base is sharded; None: nothing to shard over
    shard: int
    sequence: Axis
    tensor: Axis

    @classmethod
    def joined(
        cls, device: torch.device, sequence: int, tensor: int, offloaded: bool = False
    ) -> Mesh:
        """Of all processes of the default group; every one calls it.

        offloaded: the base is sharded even where one process holds all of it, for FSDP to fetch it.
        """
        rank, world = dist.get_rank(), dist.get_world_size()
        shards = world // tensor
        everyone = torch.arange(world)
        mesh = DeviceMesh(
            device.type, everyone.view(shards, tensor), mesh_dim_names=("shards", "tensor")
        )
        sequences = cast(
            list[list[int]], everyone.view(-1, sequence, tensor).mT.flatten(0, 1).tolist()
        )
        tensors = cast(list[list[int]], everyone.view(-1, tensor).tolist())
        return cls(
            shards=mesh["shards"] if shards > 1 or offloaded else None,
            shard=rank // tensor,
            sequence=_axis(rank, sequences),
            tensor=_axis(rank, tensors),
        )


def _axis(rank: int, listed: list[list[int]]) -> Axis:
    """That of the listed groups with this rank; every process makes all, in the same order."""
    if len(listed[0]) == 1:
        return ALONE
    groups = [(ranks, dist.new_group(ranks)) for ranks in listed]
    ranks, group = next((r, g) for r, g in groups if rank in r)
    assert isinstance(group, dist.ProcessGroup)
    return Axis(rank=ranks.index(rank), size=len(ranks), group=group)
