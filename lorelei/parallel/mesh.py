"""How the processes of an engine share the work: who holds which part of the model."""
# pyright: reportUnknownMemberType=false
# torch.distributed declares no types

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, slots=True, kw_only=True)
class Team:
    """Processes that share out one thing, and which of them this one is."""

    rank: int
    size: int
    group: dist.ProcessGroup | None  # None: this process alone

    def part(self, length: int) -> tuple[int, int]:
        """[start, stop) of this process's equal part."""
        assert length % self.size == 0, f"{length} over {self.size}"
        each = length // self.size
        return self.rank * each, (self.rank + 1) * each


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """data x sequence x tensor parallel processes, the last ones neighbours.

    The frozen base is sharded over data and sequence: those processes multiply with the same
    matrices.
    """

    shards: DeviceMesh | None  # over which the base is sharded; None: nothing to shard over
    shard: int
    sequence: Team
    tensor: Team

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
        sequences = everyone.view(-1, sequence, tensor).mT.flatten(0, 1)
        mesh = DeviceMesh(
            device.type, everyone.view(shards, tensor), mesh_dim_names=("shards", "tensor")
        )
        return cls(
            shards=mesh["shards"] if shards > 1 or offloaded else None,
            shard=rank // tensor,
            sequence=_team(rank, sequences),
            tensor=_team(rank, everyone.view(-1, tensor)),
        )


def _team(rank: int, teams: torch.Tensor) -> Team:
    """The team, a row of `teams`, with this rank.

    Every process makes every group, in the same order: torch.distributed needs it.
    """
    if teams.shape[1] == 1:
        return Team(rank=0, size=1, group=None)
    rows = cast(list[list[int]], teams.tolist())
    groups = [(ranks, dist.new_group(ranks)) for ranks in rows]
    ranks, group = next((r, g) for r, g in groups if rank in r)
    assert isinstance(group, dist.ProcessGroup)
    return Team(rank=ranks.index(rank), size=len(ranks), group=group)
