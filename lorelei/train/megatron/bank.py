"""The adapters of an engine, by the parts that this rank holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorelei.lora.bank import Named
from lorelei.lora.state import AdapterState, check_tensors, check_tied, tensor_names
from lorelei.lora.targets import Shape, match_targets, tied_names
from lorelei.train.megatron.adapter import Adapter, TargetLinear, make_adapter
from lorelei.train.megatron.collect import collect
from lorelei.train.megatron.mesh import MegatronMesh
from lorelei.types import AdapterSpec


class ShardedBank(Named[Adapter]):
    """Implements adapter_engine.Bank. The same on every rank, but for the tensors."""

    dtype = torch.float32

    def __init__(
        self,
        targets: Sequence[TargetLinear],
        shapes: Mapping[str, Shape],
        architecture: str,
        mesh: MegatronMesh,
        device: torch.device,
    ) -> None:
        """shapes: of every linear layer of the whole model, see lora.targets.module_shapes."""
        super().__init__()
        self._targets, self._shapes, self._architecture = targets, shapes, architecture
        self._mesh, self._device = mesh, device

    def add(self, name: str, spec: AdapterSpec, seed: int = 0) -> Adapter:
        self.check_free(name)
        if spec.full:
            raise ValueError(
                f"adapter {name!r}: full fine-tuning is not built on megatron; use train.kind: "
                "archon, or lora.use_lora: true"
            )
        modules = match_targets(self._shapes, spec, self._architecture)
        tied = tied_names(modules, spec)
        self[name] = make_adapter(self._targets, tied, spec, seed, self._device)
        return self[name]

    def check(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        adapter = self[name]
        shapes: dict[str, tuple[int, ...]] = {}
        for module in adapter.tied:
            a, b = tensor_names(module)
            out, wide = self._shapes[module]
            shapes |= {a: (adapter.spec.rank, wide), b: (out, adapter.spec.rank)}
        check_tensors(name, shapes, tensors)
        check_tied(name, adapter.tied, tensors)

    def load(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self.check(name, tensors)
        with torch.no_grad():
            for shard in self[name].shards:
                shard.tensor.copy_(shard.of(tensors[shard.names[0]]))

    def state(self, name: str) -> AdapterState:
        adapter = self[name]
        tensors = collect({s: s.tensor for s in adapter.shards}, self._mesh)
        return AdapterState(spec=adapter.spec, tensors=tensors)
