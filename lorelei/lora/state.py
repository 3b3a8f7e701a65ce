"""Adapter state and snapshot: an adapter's tensors under PEFT's standard names.

Full weights (spec.full) have the checkpoint's names instead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

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
