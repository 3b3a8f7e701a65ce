"""From the shards of all ranks to full tensors on the first one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lorelei.train.megatron.adapter import Shard
from lorelei.train.megatron.mesh import MegatronMesh


def collect(shards: Mapping[Shard, Tensor], mesh: MegatronMesh) -> dict[str, Tensor]:
    """{PEFT name: full tensor}, copies on the CPU, sorted, on the first rank; empty on the others.

    shards: this rank's, with the tensors to send in their places. Names that share an A share a
    tensor. Every shard travels once.
    """
    mine = {s: t for s, t in shards.items() if _sends(s, mesh)}
    listed = [[s.names, s.target.shard, s.axis, list(t.shape)] for s, t in mine.items()]
    ranks = mesh.world
    lists: list[Any] = ranks.gather_json(listed) if ranks.size > 1 else [listed]
    flat = [t.detach().to("cpu", torch.float32).reshape(-1) for t in mine.values()]
    if ranks.rank > 0:
        if flat:
            dist.send(torch.cat(flat), dst=0)
        return {}
    # {(names, axis): [(shard, its tensor)]}
    found: defaultdict[tuple[Any, Any], list[tuple[int, Tensor]]] = defaultdict(list)
    for rank, listing in enumerate(lists):
        sizes = [torch.Size(shape).numel() for *_, shape in listing]
        if rank > 0:
            got = torch.empty(sum(sizes))
            if sizes:
                dist.recv(got, src=rank)
            flat = list(got.split(sizes))
        for (names, shard, axis, shape), tensor in zip(listing, flat, strict=True):
            found[tuple(names), axis].append((shard, tensor.view(shape).clone()))
    full: dict[str, Tensor] = {}
    for (names, axis), pieces in found.items():
        ordered = [tensor for _, tensor in sorted(pieces, key=lambda piece: piece[0])]
        tensor = ordered[0] if axis is None else torch.cat(ordered, dim=axis)
        full.update(dict.fromkeys(names, tensor))
    return dict(sorted(full.items()))


def _sends(shard: Shard, mesh: MegatronMesh) -> bool:
    first = mesh.repeating(shard.target.expert).rank == 0
    return first and (shard.axis is not None or shard.target.shard == 0)
