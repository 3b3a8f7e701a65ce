"""Adapter state and snapshot: an adapter's tensors under PEFT's standard names; how it starts.

Full weights (spec.full) have the checkpoint's names instead. Shapes: R rank, D inputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorelei.lora.sharded import whole
from lorelei.types import AdapterSpec

PREFIX = "base_model.model."


def tensor_names(module: str) -> tuple[str, str]:
    """PEFT's names of A [r, in] and B [out, r] of a module ('model.layers.0.mlp.up_proj')."""
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterState:
    """The tensors of one adapter, full and on the CPU, by PEFT name, in sorted order."""

    spec: AdapterSpec
    tensors: Mapping[str, Tensor]

    def digest(self) -> str:
        """sha256 over names, shapes, dtypes and bytes; equal if and only if the adapters are."""
        sha = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            header = f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|{self.spec.scale}\n"
            sha.update(header.encode())
            sha.update(tensor.detach().contiguous().view(torch.uint8).numpy().data)
        return sha.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSnapshot:
    """Everything needed to go on training an adapter, on any engine.

    exp_avg and exp_avg_sq are Adam's moments under the names of `state.tensors`; `step` counts
    the optimizer steps behind them (0: both are zero).
    """

    state: AdapterState
    exp_avg: Mapping[str, Tensor]
    exp_avg_sq: Mapping[str, Tensor]
    step: int


def fresh_a(name: str, seed: int, rank: int, in_features: int) -> Tensor:
    """A [R, D] in fp32 on the CPU: kaiming-uniform, the same alone, among others, on any engine."""
    generator = torch.Generator().manual_seed(stable_seed(seed, name))
    bound = in_features**-0.5
    a = torch.empty(rank, in_features, dtype=torch.float32)
    return a.uniform_(-bound, bound, generator=generator)


def stable_seed(*parts: object) -> int:
    """63 bits from the parts' text; the same in every process."""
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU; names that share a tensor share its copy."""
    # an explicit copy: on the CPU `.cpu()` would share memory with the trained tensor
    made: dict[int, Tensor] = {}
    for tensor in tensors.values():
        if id(tensor) not in made:
            made[id(tensor)] = whole(tensor.detach()).to("cpu", copy=True)
    return {name: made[id(tensor)] for name, tensor in tensors.items()}


def check_tensors(
    name: str, expected: Mapping[str, tuple[int, ...]], given: Mapping[str, Tensor]
) -> None:
    """Raises ValueError naming the first tensor that is missing, unexpected or misshapen."""
    if missing := sorted(expected.keys() - given.keys()):
        raise ValueError(f"adapter {name!r}: tensor {missing[0]!r} is missing (of {len(missing)})")
    if extra := sorted(given.keys() - expected.keys()):
        raise ValueError(
            f"adapter {name!r}: tensor {extra[0]!r} belongs to no target module (of {len(extra)})"
        )
    for tensor_name, shape in expected.items():
        if tuple(given[tensor_name].shape) != shape:
            raise ValueError(
                f"adapter {name!r}: {tensor_name} has shape {tuple(given[tensor_name].shape)}, "
                f"the model and rank need {shape}"
            )


def check_tied(name: str, tied: Mapping[str, str], given: Mapping[str, Tensor]) -> None:
    """Raises ValueError when modules that share an A are given different ones.

    tied: {module: what its A is called}, see lora.targets.tied_names.
    """
    first: dict[str, str] = {}
    for module, shared in tied.items():
        other = first.setdefault(shared, module)
        one, two = (given[tensor_names(m)[0]] for m in (other, module))
        if one is not two and not torch.equal(one, two):
            raise ValueError(
                f"adapter {name!r}: {other} and {module} share their A (lora.target_modules: "
                f"{shared.rpartition('.')[2]}), and are given two; target them by their own names"
            )
