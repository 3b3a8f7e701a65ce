"""The adapters that are resident on this rank, each with its optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lorelei.lora.state import (
    AdapterSnapshot,
    AdapterState,
    check_tensors,
    check_tied,
    tensor_names,
)
from lorelei.lora.targets import Shape, match_targets, tied_names
from lorelei.train.megatron.adapter import Adapter, TargetLinear, make_adapter
from lorelei.train.megatron.layout import Layout
from lorelei.train.megatron.optimizer import ShardedOptimizer
from lorelei.types import AdapterSpec


@dataclass(slots=True, eq=False)
class Slot:
    """One adapter."""

    adapter: Adapter
    optimizer: ShardedOptimizer
    tied: Mapping[str, str]  # what each module's A is called
    shapes: Mapping[str, tuple[int, ...]]  # of the full tensors, by PEFT name
    has_gradients: bool = False

    def check(self, name: str, snapshot: AdapterSnapshot) -> None:
        """Raises ValueError unless its tensors are those of this adapter."""
        for tensors in (snapshot.state.tensors, snapshot.exp_avg, snapshot.exp_avg_sq):
            check_tensors(name, self.shapes, tensors)
            check_tied(name, self.tied, tensors)

    def clear(self) -> None:
        """Drop all gradients."""
        self.optimizer.clear()
        self.has_gradients = False


class Slots:
    """Adapters by name. The same on every rank, but for the tensors."""

    def __init__(
        self,
        sites: Sequence[TargetLinear],
        shapes: Mapping[str, Shape],
        architecture: str,
        layout: Layout,
        device: torch.device,
        distributed_optimizer: bool,
    ) -> None:
        """shapes: of every linear layer of the whole model, see lora.targets.module_shapes."""
        self._sites, self._shapes, self._architecture = sites, shapes, architecture
        self._layout, self._device = layout, device
        self._distributed = distributed_optimizer
        self._slots: dict[str, Slot] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._slots

    def __getitem__(self, name: str) -> Slot:
        if name not in self._slots:
            known = ", ".join(sorted(self._slots)) or "none"
            raise KeyError(f"no adapter {name!r}; there are: {known}")
        return self._slots[name]

    def add(self, name: str, spec: AdapterSpec, seed: int) -> Slot:
        """A fresh adapter. Raises ValueError when the name is taken or a target matches nothing."""
        if name in self._slots:
            raise ValueError(f"adapter {name!r} exists already; drop it first")
        if spec.full:
            raise ValueError(
                f"adapter {name!r}: full fine-tuning is not built on megatron; use train.kind: "
                "archon, or lora.use_lora: true"
            )
        targets = match_targets(self._shapes, spec, self._architecture)
        tied = tied_names(targets, spec)
        adapter = make_adapter(self._sites, tied, spec, seed, self._device)
        slot = Slot(
            adapter=adapter,
            optimizer=ShardedOptimizer(adapter.shards, self._layout, self._distributed),
            tied=tied,
            shapes=_tensor_shapes(targets, self._shapes, spec.rank),
        )
        self._slots[name] = slot
        return slot

    def load(self, name: str, state: AdapterState) -> None:
        """Replace an adapter's tensors, for one that is not trained."""
        slot = self[name]
        check_tensors(name, slot.shapes, state.tensors)
        check_tied(name, slot.tied, state.tensors)
        slot.optimizer.load(state.tensors)

    def drop(self, name: str) -> None:
        """Forget an adapter."""
        self[name]
        del self._slots[name]

    def clear(self, names: Iterable[str]) -> None:
        """Drop the gradients of those that are here."""
        for name in names:
            if name in self._slots:
                self._slots[name].clear()


def _tensor_shapes(
    targets: Sequence[str], shapes: Mapping[str, Shape], rank: int
) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for name in targets:
        a, b = tensor_names(name)
        out, wide = shapes[name]
        found |= {a: (rank, wide), b: (out, rank)}
    return found
