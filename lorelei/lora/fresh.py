"""How an adapter starts.

Shapes: R rank, D inputs.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


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
