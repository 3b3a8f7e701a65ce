"""AdapterBank: any number of adapters of different rank, alpha and targets on one base model.

Or one model that is trained as a whole, see lora.full.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from lorelei.lora.full import FullWeights, trained_copy
from lorelei.lora.linear import LoraPart, ModelRoute, Span, lora_linear, side_by_side
from lorelei.lora.sharded import set_from
from lorelei.lora.state import (
    AdapterState,
    check_tensors,
    check_tied,
    copies,
    fresh_a,
    stable_seed,
    tensor_names,
)
from lorelei.lora.targets import match_targets, tied_names
from lorelei.model.backend import Weight
from lorelei.model.linear import FrozenLinear, FusedInput, transformed
from lorelei.types import AdapterSpec


class Base(Protocol):
    """A frozen base model: our decoder, or another whose linear layers are FrozenLinear."""

    @property
    def architecture(self) -> str:
        """transformers' name of it, for people."""
        ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def linears(self) -> list[FrozenLinear]:
        """Every linear layer that an adapter may target, in order of execution."""
        ...


T = TypeVar("T")


class Named(dict[str, T]):
    """Adapters by name."""

    def __missing__(self, name: str) -> T:
        known = ", ".join(sorted(self)) or "none"
        raise KeyError(f"no adapter {name!r}; there are: {known}")

    def check_free(self, name: str) -> None:
        """Raises ValueError when the name is taken."""
        if name in self:
            raise ValueError(f"adapter {name!r} exists already; drop it first")

    def drop(self, name: str) -> None:
        """Forget an adapter."""
        self[name]
        del self[name]


B = TypeVar("B", bound=Base)
Copy = Callable[[B, torch.dtype], FullWeights[B]]


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """One adapter's tensors, by the layer they act on."""

    spec: AdapterSpec
    seed: int
    layers: Mapping[FrozenLinear, tuple[LoraPart, ...]]  # tied parts have the same tensor as A
    tied: Mapping[str, str]  # what each module's A is called

    def tensors(self) -> dict[str, Tensor]:
        """The live tensors by PEFT name, sorted."""
        found: dict[str, Tensor] = {}
        for part in (part for parts in self.layers.values() for part in parts):
            name_a, name_b = tensor_names(part.name)
            found[name_a], found[name_b] = part.a, part.b
        return dict(sorted(found.items()))


class AdapterBank(Named["Adapter | FullWeights[Any]"], Generic[B]):
    """Holds adapters and makes the routes that apply them.

    Adapter tensors are fp32 over a base of any narrower dtype, and on the base's device.
    """

    def __init__(self, decoder: B, copy: Copy[Any] = trained_copy) -> None:
        """copy: makes the full weights of a base."""
        super().__init__()
        self.decoder, self._copy = decoder, copy
        self.dtype = torch.promote_types(decoder.dtype, torch.float32)

    def lora(self, name: str) -> Adapter:
        """An adapter that is not full weights."""
        adapter = self[name]
        assert isinstance(adapter, Adapter), f"{name} is full weights"
        return adapter

    def add(self, name: str, spec: AdapterSpec, seed: int = 0) -> Adapter | FullWeights[B]:
        """A fresh adapter: A kaiming-uniform, B zero. Full weights: those of the base.

        Raises ValueError when the name is taken, a target matches nothing or full weights would
        not be alone.
        """
        self.check_free(name)
        if self and (spec.full or self._full() is not None):
            raise ValueError(
                f"adapter {name!r}: full fine-tuning trains one model and nothing beside it, and "
                f"{min(self)!r} is there; drop it first, or use LoRA"
            )
        if spec.full:
            self[name] = self._copy(self.decoder, self.dtype)
            return self[name]
        linears = self.decoder.linears()
        parts = {part.name: layer for layer in linears for part in layer.parts}
        targets = match_targets(list(parts), spec, self.decoder.architecture)
        tied = tied_names(targets, spec)
        shared: dict[str, Tensor] = {}  # every A so far by its name
        layers: dict[FrozenLinear, tuple[LoraPart, ...]] = {}
        for layer in linears:
            made: list[LoraPart] = []
            for part in (p for p in layer.parts if p.name in tied):
                called = tied[part.name]
                if called not in shared:
                    a = fresh_a(called, seed, spec.rank, layer.in_features)
                    shared[called] = a.to(self.decoder.device, self.dtype).requires_grad_()
                b = shared[called].new_zeros(part.stop - part.start, spec.rank, requires_grad=True)
                made.append(LoraPart(part.name, shared[called], b, part.start, part.stop))
            if made:
                layers[layer] = tuple(made)
        self[name] = Adapter(spec, seed, layers, tied)
        return self[name]

    def _full(self) -> FullWeights[B] | None:
        alone = next(iter(self.values()), None)
        return None if isinstance(alone, Adapter) else alone

    def state(self, name: str) -> AdapterState:
        """A copy of an adapter's tensors."""
        adapter = self[name]
        return AdapterState(spec=adapter.spec, tensors=copies(adapter.tensors()))

    def check(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Raises ValueError unless names and shapes are those of an adapter."""
        adapter = self[name]
        shapes = {n: tuple(t.shape) for n, t in adapter.tensors().items()}
        check_tensors(name, shapes, tensors)
        if isinstance(adapter, Adapter):
            check_tied(name, adapter.tied, tensors)

    def load(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite an adapter's tensors. Raises ValueError unless names and shapes agree."""
        self.check(name, tensors)
        for tensor_name, tensor in self[name].tensors().items():
            set_from(tensor, tensors[tensor_name])

    def model(
        self, spans: Sequence[tuple[str | None, int]], dropout_seed: int | None = None
    ) -> tuple[B, ModelRoute]:
        """The decoder that a row of tokens goes through, and its route; see `route`."""
        full = self._full()
        if full is not None and all(name is not None for name, _ in spans):
            return full.decoder, full.route
        return self.decoder, self.route(spans, dropout_seed)

    def route(
        self, spans: Sequence[tuple[str | None, int]], dropout_seed: int | None = None
    ) -> BankRoute:
        """The route of a row of tokens: (adapter or None, number of tokens), in order.

        dropout_seed: draws the dropout masks; None (inference) turns dropout off.
        """
        stretches: list[_Stretch] = []
        counts: Counter[str | None] = Counter()
        start = 0
        for name, neighbours in groupby(spans, key=lambda span: span[0]):
            stop = start + sum(length for _, length in neighbours)
            adapter = self.lora(name) if name is not None else None
            stretches.append(_Stretch(start, stop, adapter, counts[name]))
            counts[name] += 1
            start = stop
        return BankRoute(tuple(stretches), start, dropout_seed)

    def merged(self, name: str) -> MergedRoute:
        """A route for decoding with one adapter, over a private packed copy of W + scale * B A."""
        adapter = self.lora(name)
        weights: dict[FrozenLinear, Weight] = {}
        with torch.no_grad():
            for layer, parts in adapter.layers.items():
                weights[layer] = layer.weight.with_lora_delta(
                    *side_by_side(layer, parts, adapter.spec.scale)
                )
        return MergedRoute(weights)


@dataclass(frozen=True, slots=True)
class _Stretch:
    start: int
    stop: int
    adapter: Adapter | None
    ordinal: int  # among the adapter's stretches: each draws another dropout mask


class BankRoute:
    """Tokens of several adapters, and of none, in one row; an adapter's need not be neighbours."""

    def __init__(
        self, stretches: tuple[_Stretch, ...], tokens: int, dropout_seed: int | None
    ) -> None:
        self._stretches, self._tokens, self._dropout_seed = stretches, tokens, dropout_seed

    def __call__(
        self, layer: FrozenLinear, x_TD: Tensor, fused_input: FusedInput | None = None
    ) -> Tensor:
        assert len(x_TD) == self._tokens, f"route of {self._tokens} tokens, row of {len(x_TD)}"
        return lora_linear(layer, x_TD, self.spans(layer), fused_input)

    def spans(self, layer: FrozenLinear) -> tuple[Span, ...]:
        """What the adapters do to a layer's row of tokens."""
        found: list[Span] = []
        for s in self._stretches:
            parts = s.adapter.layers.get(layer) if s.adapter is not None else None
            if s.adapter is None or parts is None or s.start == s.stop:
                continue
            dropout, seed = 0.0, 0
            if self._dropout_seed is not None and s.adapter.spec.dropout > 0:
                dropout = s.adapter.spec.dropout
                seed = stable_seed(s.adapter.seed, self._dropout_seed, s.ordinal, parts[0].name)
            found.append(Span(s.start, s.stop, s.adapter.spec.scale, parts, dropout, seed))
        return tuple(found)

    def adapts(self, layer: FrozenLinear) -> bool:
        """Whether any adapter of the row acts on this layer."""
        return any(s.adapter is not None and layer in s.adapter.layers for s in self._stretches)

    def take(self, index: Tensor) -> BankRoute:
        chosen = index.cpu().numpy()
        stretches: list[_Stretch] = []
        for s in self._stretches:
            start, stop = (int(chosen.searchsorted(end)) for end in (s.start, s.stop))
            if stop > start:
                stretches.append(_Stretch(start, stop, s.adapter, s.ordinal))
        return BankRoute(tuple(stretches), len(chosen), self._dropout_seed)


class MergedRoute:
    """Every token through one adapter, merged: costs no more than the base. For inference only."""

    def __init__(self, weights: Mapping[FrozenLinear, Weight]) -> None:
        self._weights = weights

    def __call__(
        self, layer: FrozenLinear, x_TD: Tensor, fused_input: FusedInput | None = None
    ) -> Tensor:
        return self.weight(layer).product(transformed(x_TD, fused_input), layer.bias)

    def weight(self, layer: FrozenLinear) -> Weight:
        """What a layer multiplies with."""
        return self._weights.get(layer, layer.weight)

    def take(self, index: Tensor) -> MergedRoute:
        return self
