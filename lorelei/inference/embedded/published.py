"""The adapter versions an engine can serve: its own copies, never the tensors being trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import torch

from lorelei.inference.embedded.route import PublishedRoute, RoutedSpan, low_rank
from lorelei.lora.bank import AdapterBank, MergedRoute
from lorelei.lora.full import serving_copy
from lorelei.lora.state import AdapterState
from lorelei.model.backend import LowRank
from lorelei.model.decoder import Decoder
from lorelei.model.linear import FrozenLinear
from lorelei.model.weights import named_tensors

# merging a version costs about as much as this many steps of twenty rows save
MERGE_STEPS = 48


class PublishedAdapters:
    """Immutable adapter versions by served name, and at most one private merged copy."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._bank = AdapterBank(decoder)
        self._layers: dict[str, Mapping[FrozenLinear, LowRank]] = {}
        self._models: dict[str, Decoder] = {}  # of full weights
        self._merged: tuple[str, MergedRoute] | None = None

    def install(self, name: str, state: AdapterState) -> str:
        """Copy a version's tensors and return the digest of the copy, taken from the copy.

        Raises ValueError, and then has changed nothing, for tensors that do not fit.
        """
        if name in self._bank:  # versions are immutable: it is the same one, sent again
            return self._bank.state(name).digest()
        for tensor_name, tensor in state.tensors.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"adapter {name!r}: {tensor_name} has values that are not finite")
        if state.spec.full:
            return self._install_model(name, state)
        self._bank.add(name, state.spec)
        try:
            self._bank.load(name, state.tensors)
        except ValueError:
            self._bank.drop(name)
            raise
        self._layers[name] = low_rank(self._bank.lora(name), self._decoder.dtype)
        return self._bank.state(name).digest()

    def _install_model(self, name: str, state: AdapterState) -> str:
        if name not in self._models:
            self._models[name] = serving_copy(self._decoder, name, state)
            self._layers[name] = {}
            return state.digest()  # the copy was compared with it
        held = dict(named_tensors(self._models[name]))
        return AdapterState(spec=state.spec, tensors=held).digest()

    def decoder(self, name: str | None) -> Decoder:
        """What rows of this adapter go through: the base, or its own full weights."""
        return self._models.get(name or "", self._decoder)

    def share_steps(self, one: str | None, other: str | None) -> bool:
        """Whether rows of both adapters can be decoded in one step."""
        return self.decoder(one) is self.decoder(other)

    def remove(self, name: str) -> None:
        del self._layers[name]
        if self._models.pop(name, None) is None:
            self._bank.drop(name)
        if self._merged is not None and self._merged[0] == name:
            self.drop_merged()

    def drop_merged(self) -> None:
        """Forget the private copy: no rows are left, or memory is wanted elsewhere."""
        self._merged = None

    def settle(self, names: set[str | None], pending_steps: int) -> None:
        """Choose how rows of these adapters are decoded, for at most `pending_steps` steps.

        The choice depends on the rows since the engine was last idle and on nothing else, so
        the same requests always give the same bits.
        """
        name = next(iter(names)) if len(names) == 1 else None
        held = self._merged[0] if self._merged is not None else None
        if name is not None and name == held:
            return
        self.drop_merged()  # first: two copies need not fit into memory
        if name is not None and name not in self._models and pending_steps >= MERGE_STEPS:
            self._merged = (name, self._bank.merged(name))

    def route(self, names: Sequence[str | None]) -> PublishedRoute | MergedRoute:
        """The route of tokens by adapter, by the choice that was settled for them."""
        if self._merged is not None:
            return self._merged[1]
        return self.unmerged([(name, len(list(run))) for name, run in groupby(names)])

    def unmerged(self, spans: Sequence[tuple[str | None, int]]) -> PublishedRoute:
        """The route of (adapter, number of tokens) spans."""
        routed: list[RoutedSpan] = []
        start = 0
        for name, length in spans:
            if name is not None:
                routed.append(RoutedSpan(start, start + length, self._layers[name]))
            start += length
        return PublishedRoute(routed)
