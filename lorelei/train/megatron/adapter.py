"""An adapter as this rank holds it: the parts of its tensors for the layers that are here.

B is split like the outputs of a column-parallel layer, A like the inputs of a row-parallel one;
the other of the two is whole on every rank. Both keep the order of the checkpoint's rows, so a
shard is a contiguous piece of the full tensor, whatever order Megatron's fused weight has.
Shapes: R rank, D inputs and O outputs of this rank's shard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lorelei.lora.state import fresh_a, tensor_names
from lorelei.types import AdapterSpec

Style = Literal["column", "row"]


@dataclass(frozen=True, slots=True, eq=False)
class TargetLinear:
    """A linear layer of the model on this rank, and the checkpoint's layers fused into it."""

    module: nn.Module
    style: Style
    parts: tuple[str, ...]  # the checkpoint's names, in the order of the outputs
    widths: tuple[int, ...]  # outputs of each on this rank
    inputs: int  # on this rank
    groups: int  # how many times the outputs repeat the order of the parts (key/value heads)
    expert: bool
    shards: int  # ranks that a weight is split over
    shard: int  # this one's number
    partial: bool  # gradients of tensors that are whole on each of these ranks are parts of a sum


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """A trained tensor of this rank. A tied A has the names of all its modules."""

    names: tuple[str, ...]  # PEFT's
    tensor: Tensor
    axis: int | None  # the dimension that is split over ranks; None: whole on each of them
    target: TargetLinear

    @property
    def partial(self) -> bool:
        """Whether its gradient has to be summed over the ranks that have it whole."""
        return self.target.partial and self.axis is None

    def of(self, full: Tensor) -> Tensor:
        """This rank's piece of a full tensor."""
        if self.axis is None:
            return full
        return full.chunk(self.target.shards, self.axis)[self.target.shard]


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A [R, D] and B [O, R] of one of a target's parts; tied parts have the same A."""

    name: str
    number: int  # among the target's parts
    a: Tensor
    b: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """What one adapter adds on this rank."""

    spec: AdapterSpec
    seed: int
    targets: Mapping[nn.Module, tuple[TargetLinear, tuple[Part, ...]]]
    shards: tuple[Shard, ...]
    tied: Mapping[str, str]  # what the A of each module of the whole model is called


def make_adapter(
    targets: Sequence[TargetLinear],
    tied: Mapping[str, str],
    spec: AdapterSpec,
    seed: int,
    device: torch.device,
) -> Adapter:
    """A fresh adapter in fp32. tied: what each targeted module's A is called."""
    made: dict[nn.Module, tuple[TargetLinear, tuple[Part, ...]]] = {}
    shards: list[Shard] = []
    for target in targets:
        parts: list[Part] = []
        shared: dict[str, Tensor] = {}
        targeted = [(i, name) for i, name in enumerate(target.parts) if name in tied]
        for number, name in targeted:
            called = tied[name]
            if called not in shared:
                shared[called] = _fresh_a(target, called, spec.rank, seed, device)
                names = tuple(tensor_names(n)[0] for _, n in targeted if tied[n] == called)
                axis = 1 if target.style == "row" else None
                shards.append(Shard(names, shared[called], axis, target))
            b = torch.zeros(target.widths[number], spec.rank, device=device).requires_grad_()
            axis = 0 if target.style == "column" else None
            shards.append(Shard((tensor_names(name)[1],), b, axis, target))
            parts.append(Part(name, number, shared[called], b))
        if parts:
            made[target.module] = (target, tuple(parts))
    return Adapter(spec, seed, made, tuple(sorted(shards, key=lambda s: s.names)), tied)


def _fresh_a(
    target: TargetLinear, called: str, rank: int, seed: int, device: torch.device
) -> Tensor:
    if target.style == "column":
        full = fresh_a(called, seed, rank, target.inputs)
    else:
        full = fresh_a(called, seed, rank, target.inputs * target.shards)
        full = full.chunk(target.shards, 1)[target.shard]
    return full.contiguous().to(device).requires_grad_()
