"""Decoding steps on CUDA in half precision: two attention calls a layer, and CUDA graphs.

A step of a small batch launches a thousand kernels that each take microseconds, so it is recorded
once and replayed. What changes from step to step therefore lies in tables at fixed addresses, and
rows are padded to a power of two: rows of a recording may leave without another recording.

Shapes: B rows with padding (a power of two), L layers, K key/value heads, d head size,
V vocabulary, A tokens of the arena.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lorelei.inference.embedded.attention import PromptRows
from lorelei.inference.embedded.kv_cache import PromptCache, RowCache
from lorelei.model.backend import flashes
from lorelei.model.decoder import Decoder
from lorelei.model.flash_attention import flash_spans
from lorelei.model.linear import Route
from lorelei.model.mlp import Moe

_EAGER_STEPS = 2  # of a shape, before it is worth recording
_MOST_RECORDINGS = 16
_FIRST_ARENA = 1024


class PromptArena:
    """Copies of prompts' keys and values in one block, where one call of a kernel finds them."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.release()

    def release(self) -> None:
        self._starts: WeakKeyDictionary[PromptCache, int] = WeakKeyDictionary()
        self._used = 0
        self._allocate(0)

    def _allocate(self, tokens: int) -> None:
        config, of = self._decoder.config, self._decoder.embedding
        shape = (config.layers, tokens, config.kv_heads, config.head_dim)
        self._keys, self._values = of.new_empty(shape), of.new_empty(shape)

    def place(self, prompts: Sequence[PromptCache]) -> list[int]:
        """Where each of the prompts begins; those that the arena lacks are copied into it."""
        new = [p for p in prompts if p not in self._starts]
        if self._used + sum(map(_tokens, new)) > self.capacity:
            total = sum(map(_tokens, prompts))
            if total > self.capacity:
                self._allocate(max(1 << (total - 1).bit_length(), _FIRST_ARENA))
            self._starts.clear()
            self._used, new = 0, list(prompts)
        for prompt in new:
            span = slice(self._used, self._used + _tokens(prompt))
            self._keys[:, span] = prompt.keys.transpose(1, 2)
            self._values[:, span] = prompt.values.transpose(1, 2)
            self._starts[prompt], self._used = span.start, span.stop
        return [self._starts[p] for p in prompts]

    @property
    def capacity(self) -> int:
        return self._keys.shape[1]

    @property
    def address(self) -> int:
        return self._keys.data_ptr()

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """[A, K, d]."""
        return self._keys[layer], self._values[layer]


def _tokens(prompt: PromptCache) -> int:
    return prompt.keys.shape[2]


class Tables:
    """What a step of B places reads, in memory that stays where it is."""

    def __init__(self, places: int, device: torch.device) -> None:
        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.places = places
        self.fed = torch.zeros(2, places, dtype=torch.int64, device=device)  # tokens, lengths
        self.slots = torch.zeros(places, dtype=torch.int64, device=device)
        self.prompt_lengths = torch.zeros(places, dtype=torch.int64, device=device)  # of rows
        self.rows = torch.arange(places + 1, dtype=torch.int32, device=device)
        self.own_starts = ints(places + 1)
        # of the prompts; behind the last one, prompts of no rows
        self.ends, self.starts, self.lengths = ints(places + 1), ints(places + 1), ints(places)

    def fill(self, slots: Sequence[int], groups: Sequence[PromptRows], at: Sequence[int]) -> None:
        """Padding rows continue the last prompt in slots that no row has."""
        spare = self.places - len(slots)
        none = self.places - len(groups)
        lengths = [_tokens(group.cache) for group in groups]
        of_rows = [n for g, n in zip(groups, lengths, strict=True) for _ in range(g.start, g.stop)]
        _write(self.slots, [*slots, *range(len(slots), self.places)])
        _write(self.prompt_lengths, [*of_rows, *[of_rows[-1]] * spare])
        ends = [0, *(group.stop for group in groups)]
        _write(self.ends, [*ends[:-1], *[self.places] * (none + 1)])
        _write(self.starts, [*at, *[0] * (none + 1)])
        _write(self.lengths, [*lengths, *[0] * none])


def _write(target: Tensor, values: Sequence[int]) -> None:
    target.copy_(torch.tensor(values))


class FlashStepAttention:
    """StepAttention by two calls: over what each row sampled, and over the prompts."""

    def __init__(self, cache: RowCache, arena: PromptArena, tables: Tables) -> None:
        self._cache, self._arena, self._tables = cache, arena, tables
        self._own_lengths = (tables.fed[1] + 1).int()

    def __call__(self, layer: int, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        t = self._tables
        self._cache.append(layer, t.slots, t.fed[1], k_TKd, v_TKd)
        own_spans = t.rows, t.own_starts, self._own_lengths, 1
        own, own_lse_HB = flash_spans(q_THd, *self._cache.flat(layer), *own_spans)
        spans = t.ends, t.starts, t.lengths, t.places
        shared, shared_lse_HB = flash_spans(q_THd, *self._arena.layer(layer), *spans)
        share = torch.sigmoid(shared_lse_HB - own_lse_HB).T[..., None]
        return own.lerp(shared, share.to(own.dtype))


@dataclass(frozen=True, slots=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    logits: Tensor
    read: tuple[Any, ...]  # what it reads must stay in memory


class FlashSteps:
    """The steps of a decoder on CUDA."""

    def __init__(self, decoder: Decoder, cache: RowCache) -> None:
        self._cache, self._arena = cache, PromptArena(decoder)
        self._device = decoder.device
        # the tokens of an expert are counted on the host
        self._records = not any(isinstance(layer.mlp, Moe) for layer in decoder.layers)
        self._all_tables: dict[int, Tables] = {}
        self._recordings: dict[tuple[Any, ...], _Recording] = {}
        self._seen: dict[tuple[Any, ...], int] = {}
        self._addresses = self._recorded = (0, 0)

    @staticmethod
    def fit(decoder: Decoder) -> bool:
        """Whether this machine has the kernels for such a model."""
        return flashes(decoder.embedding.new_empty(0, decoder.config.head_dim))

    def forget(self) -> None:
        """Drop the recordings, and with them what they keep in memory."""
        self._recordings.clear()
        self._seen.clear()

    def release(self) -> None:
        """No row is left."""
        self.forget()
        self._arena.release()

    def plan(
        self, slots: Sequence[int], groups: Sequence[PromptRows], adapters: Sequence[str | None]
    ) -> list[str | None]:
        """Steps of these rows follow. Returns the adapters [B] of all places."""
        places = 1 << (len(slots) - 1).bit_length()
        everywhere = [*adapters, *[adapters[-1]] * (places - len(adapters))]
        self._spans = tuple((name, len(list(run))) for name, run in groupby(everywhere))
        if places not in self._all_tables:
            self._all_tables[places] = Tables(places, self._device)
        self._tables = self._all_tables[places]
        self._tables.fill(slots, groups, self._arena.place([group.cache for group in groups]))
        self._count = len(slots)
        self._longest_prompt = max(_tokens(group.cache) for group in groups)
        self._addresses = (0, 0)  # the slots may have changed
        return everywhere

    def logits(
        self, tokens: Sequence[int], held: Sequence[int], decoder: Decoder, route: Route
    ) -> Tensor:
        """[rows, V] after the rows' last tokens; held: how many tokens of each are cached."""
        tables, spare = self._tables, self._tables.places - self._count
        self._cache.reserve(tables.places, max(held) + 1)
        self._settle()
        tables.fed.copy_(torch.tensor([[*tokens, *[0] * spare], [*held, *[0] * spare]]))
        longest = self._longest_prompt + self._cache.capacity
        longest = 1 << (longest - 1).bit_length()
        key = (self._spans, longest, decoder, type(route))
        if (recording := self._recordings.get(key)) is None:
            seen = self._seen[key] = self._seen.get(key, 0) + 1
            if not self._records or seen <= _EAGER_STEPS:
                return self._compute(decoder, route, longest)[: self._count]
            if len(self._recordings) == _MOST_RECORDINGS:
                self.forget()
            recording = self._recordings[key] = self._record(decoder, route, longest)
        recording.graph.replay()
        return recording.logits[: self._count]

    def _settle(self) -> None:
        """Follow the caches, which move when they grow."""
        addresses = (self._cache.address, self._arena.address)
        if addresses == self._addresses:
            return
        if addresses != self._recorded:
            self.forget()
        self._addresses = self._recorded = addresses
        self._tables.own_starts[:-1] = self._tables.slots * self._cache.capacity

    def _compute(self, decoder: Decoder, route: Route, longest: int) -> Tensor:
        tables = self._tables
        attend = FlashStepAttention(self._cache, self._arena, tables)
        positions = tables.fed[1] + tables.prompt_lengths
        hidden_BD = decoder(tables.fed[0], positions, route, attend, longest=longest)
        return route(decoder.head, hidden_BD)

    def _record(self, decoder: Decoder, route: Route, longest: int) -> _Recording:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            # other threads, such as the trainer's, may do what a recording may not
            graph.capture_begin(capture_error_mode="thread_local")
            logits = self._compute(decoder, route, longest)
            graph.capture_end()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        return _Recording(graph, logits, (decoder, route, decoder.rotary.table))
