"""Keys and values: of prompts, one block read by all rows of a prompt, and of what rows sampled.

Shapes: L layers, S slots, K key/value heads, C capacity, P prompt tokens, B rows, d head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorelei.inference.embedded.kind import row_capacity
from lorelei.model.backend import flashes
from lorelei.model.decoder import Decoder


class PromptCache:
    """Keys and values of one prompt's tokens, [L, K, P, d]; written once, by its prefill."""

    def __init__(self, decoder: Decoder, length: int) -> None:
        config = decoder.config
        shape = (config.layers, config.kv_heads, length, config.head_dim)
        self.keys = torch.empty(shape, dtype=decoder.dtype, device=decoder.device)
        self.values = torch.empty_like(self.keys)
        self.hidden = self.keys.new_empty(config.hidden)  # [D] of the last token


class RowCache:
    """Keys and values of sampled tokens, [L, S, K, C, d]: the row in slot s owns [:, s].

    The rows in use are slots 0 to B - 1. Slots and capacity grow by doubling. Where CUDA's kernels
    read whole tokens, a token's heads are neighbours in memory.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._whole_tokens = flashes(decoder.embedding.new_empty(0, decoder.config.head_dim))
        self.release()

    def release(self) -> None:
        """Give the memory back. All slots are empty then."""
        self._keys = self._values = self._allocate(0, 0)

    def _allocate(self, slots: int, capacity: int) -> Tensor:
        config, decoder = self._decoder.config, self._decoder
        heads, d = config.kv_heads, config.head_dim
        inner = (capacity, heads, d) if self._whole_tokens else (heads, capacity, d)
        # zeros: what is masked has weight 0, and 0 * NaN of uninitialised memory would be NaN
        found = decoder.embedding.new_zeros(config.layers, slots, *inner)
        return found.transpose(2, 3) if self._whole_tokens else found

    def reserve(self, slots: int, capacity: int) -> None:
        """Make room for that many rows of that many tokens."""
        had_slots, had_capacity = self._keys.shape[1], self._keys.shape[3]
        if slots <= had_slots and capacity <= had_capacity:
            return
        new_slots = max(slots, 2 * had_slots) if slots > had_slots else had_slots
        new_capacity = max(had_capacity, row_capacity(capacity, self._whole_tokens))
        for name in ("_keys", "_values"):
            grown = self._allocate(new_slots, new_capacity)
            grown[:, :had_slots, :, :had_capacity] = getattr(self, name)
            setattr(self, name, grown)

    def append(
        self, layer: int, slots_B: Tensor, lengths_B: Tensor, k_BKd: Tensor, v_BKd: Tensor
    ) -> None:
        """Write one token a row at position lengths[row] of slot slots[row]."""
        self._keys[layer][slots_B, :, lengths_B] = k_BKd
        self._values[layer][slots_B, :, lengths_B] = v_BKd

    def read(self, layer: int, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Views [B, K, length, d] of the first `rows` slots."""
        return self._keys[layer, :rows, :, :length], self._values[layer, :rows, :, :length]

    @property
    def whole(self) -> tuple[Tensor, Tensor]:
        """Keys and values, [L, S, K, C, d]."""
        return self._keys, self._values

    @property
    def capacity(self) -> int:
        return self._keys.shape[3]

    @property
    def address(self) -> int:
        return self._keys.data_ptr()

    def flat(self, layer: int) -> tuple[Tensor, Tensor]:
        """Views [S * C, K, d] of all slots, where the device's kernels read whole tokens."""
        keys, values = (x[layer].transpose(1, 2).flatten(0, 1) for x in (self._keys, self._values))
        return keys, values

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a row's first `length` tokens into another slot."""
        for cache in (self._keys, self._values):
            cache[:, target, :, :length] = cache[:, source, :, :length]

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes
