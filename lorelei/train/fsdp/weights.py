"""Reading a checkpoint into a sharded model: every process reads its own slices and no more."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lorelei.model.load import CheckpointError, open_tensors, shards
from lorelei.train.fsdp.linear import HostedLinear


@dataclass(frozen=True, slots=True, eq=False)
class StoredParameter:
    """A parameter, the modules that hold it, and its part of the checkpoint's tensor."""

    names: tuple[str, ...]
    holders: tuple[tuple[nn.Module, str], ...]
    whole: tuple[int, ...]  # the shape of that tensor
    region: tuple[slice, ...]  # of this process, before the base is sharded

    @property
    def parameter(self) -> nn.Parameter:
        module, name = self.holders[0]
        return getattr(module, name)

    def set(self, parameter: nn.Parameter) -> None:
        """Give it to all its modules."""
        for module, name in self.holders:
            setattr(module, name, parameter)


def stored_parameters(lm: nn.Module) -> list[StoredParameter]:
    """Of every parameter, once; called before anything is sharded."""
    names: dict[int, list[str]] = {}
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    regions: dict[int, tuple[tuple[int, ...], tuple[slice, ...]]] = {}
    for prefix, module in lm.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            key = id(parameter)
            names.setdefault(key, []).append(f"{prefix}.{name}")
            holders.setdefault(key, []).append((module, name))
            whole, region = tuple(parameter.shape), tuple(slice(0, n) for n in parameter.shape)
            if isinstance(module, HostedLinear):
                whole, region = module.place(name)
            regions.setdefault(key, (whole, region))
    return [StoredParameter(tuple(names[key]), tuple(holders[key]), *regions[key]) for key in names]


def load_weights(
    lm: PreTrainedModel,
    held: list[StoredParameter],
    folder: Path,
    home: torch.device,
    device: torch.device,
    shard: int,
) -> None:
    """Fill a model on the meta device: parameters at home, buffers on the device.

    Raises CheckpointError for a tensor that does not fit.
    """
    with ExitStack() as files:
        checkpoint = open_tensors(shards(folder), files)
        if not checkpoint:
            raise CheckpointError(
                f"model: {folder} has no .safetensors file, as train.kind fsdp needs it"
            )
        for wanted in held:
            file, name = _find(checkpoint, wanted, lm.base_model_prefix, folder)
            tensor = _read(file, name, wanted, shard, folder)
            wanted.set(_filled(wanted.parameter, tensor.to(home)))
        _load_buffers(lm, checkpoint, device)


def _find(
    checkpoint: dict[str, Any], wanted: StoredParameter, prefix: str, folder: Path
) -> tuple[Any, str]:
    """The tensor of a parameter; checkpoints of base models lack the prefix."""
    for name in wanted.names:
        for spelled in (name, name.removeprefix(f"{prefix}.")):
            if spelled in checkpoint:
                return checkpoint[spelled], spelled
    raise CheckpointError(
        f"model: {folder} has no tensor {wanted.names[0]!r}; is it complete? (train.kind fsdp "
        "reads checkpoints that name tensors as transformers' modules do)"
    )


def _read(file: Any, name: str, wanted: StoredParameter, shard: int, folder: Path) -> Tensor:
    """This process's part."""
    stored = file.get_slice(name)
    parameter, region = wanted.parameter, wanted.region
    if tuple(stored.get_shape()) != wanted.whole:
        raise CheckpointError(
            f"model: tensor {name!r} of {folder} has shape {list(stored.get_shape())}, "
            f"config.json asks for {list(wanted.whole)}"
        )
    if isinstance(parameter, DTensor):  # shards of rows, as torch.chunk makes them
        rows, size = region[0], parameter.device_mesh.size()
        each = -(-(rows.stop - rows.start) // size)
        start = min(rows.start + shard * each, rows.stop)
        region = (slice(start, min(start + each, rows.stop)), *region[1:])
    if not region:
        return file.get_tensor(name).to(parameter.dtype)
    if region[0].start == region[0].stop:  # fewer rows than shards
        return torch.empty(0, *wanted.whole[1:], dtype=parameter.dtype)
    return stored[region].to(parameter.dtype).contiguous()


def _filled(parameter: nn.Parameter, local: Tensor) -> nn.Parameter:
    """A parameter like the one on the meta device, with these values."""
    if not isinstance(parameter, DTensor):
        return nn.Parameter(local, requires_grad=parameter.requires_grad)
    held = DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return nn.Parameter(held, requires_grad=parameter.requires_grad)


def _load_buffers(lm: PreTrainedModel, checkpoint: dict[str, Any], device: torch.device) -> None:
    """Buffers that are stored, and those that transformers computes from the configuration."""
    computed: list[tuple[str, Tensor]] = []
    for name, buffer in list(lm.named_buffers()):
        module, _, leaf = name.rpartition(".")
        holder = lm.get_submodule(module)
        fresh = torch.empty_like(buffer, device=device)
        if name in checkpoint:
            fresh = checkpoint[name].get_tensor(name).to(device, buffer.dtype)
            _mark_initialised(fresh)
        else:
            if fresh.is_floating_point():
                fresh.fill_(float("nan"))
            computed.append((name, fresh))
        setattr(holder, leaf, fresh)
    for parameter in lm.parameters():
        _mark_initialised(parameter)
    lm.initialize_weights()
    for name, buffer in computed:
        if buffer.is_floating_point() and buffer.isnan().any():
            raise CheckpointError(
                f"model: {type(lm).__name__} has a buffer {name!r} that is neither in the "
                "checkpoint nor computed by transformers' _init_weights"
            )


def _mark_initialised(tensor: Tensor) -> None:
    """transformers then leaves it as it is."""
    setattr(tensor, "_is_hf_initialized", True)  # noqa: B010  (no declared attribute of tensors)
