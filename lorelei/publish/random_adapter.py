"""A large random adapter: every tensor of it matters.

Shapes: R rank.
"""

from __future__ import annotations

import hashlib

import torch

from lorelei.lora.state import AdapterSnapshot, AdapterState


def random_adapter(fresh: AdapterState, size: float, name: str) -> AdapterState:
    """A fresh adapter with random B; `size` 1 adds about as much as a layer's input is large.

    A stays as the engine made it, so that modules that share one keep it. All values are whole in
    bfloat16: a rollout engine of that dtype holds the same adapter. name: gives the numbers.
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1
    generator = torch.Generator().manual_seed(seed)
    deviation = size / (fresh.spec.scale * fresh.spec.rank**0.5)
    tensors = {
        tensor_name: (
            tensor
            if "lora_A" in tensor_name
            else torch.empty(tensor.shape).normal_(0, deviation, generator=generator)
        )
        .to(torch.bfloat16)
        .to(tensor.dtype)
        for tensor_name, tensor in sorted(fresh.tensors.items())
    }
    return AdapterState(spec=fresh.spec, tensors=tensors)


def untrained(state: AdapterState) -> AdapterSnapshot:
    """The snapshot of an adapter that no optimizer has seen."""
    zeros = {name: torch.zeros_like(tensor) for name, tensor in state.tensors.items()}
    return AdapterSnapshot(state=state, exp_avg=zeros, exp_avg_sq=zeros, step=0)
