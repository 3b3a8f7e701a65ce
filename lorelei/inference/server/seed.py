"""Names of random streams, as servers take them."""

from __future__ import annotations

import hashlib


def stream_seed(seed: int, key: str, position: int = 0) -> int:
    """A seed [0, 2**63) for the random stream named (seed, key), from a position on."""
    name = hashlib.blake2b(f"{seed}\0{key}\0{position}".encode(), digest_size=8).digest()
    return int.from_bytes(name, "little") >> 1
