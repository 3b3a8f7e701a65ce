"""Safetensors bytes in memory, and the checks on an adapter's tensors.

Shapes: R rank. A is [R, in], B is [out, R].
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from lorelei.lora.state import PREFIX, tensor_names
from lorelei.store.durable import CorruptFile

_SUFFIXES = (".lora_A.weight", ".lora_B.weight")


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: tuple[str, str]) -> bytes:
    """A safetensors file; equal input gives equal bytes.

    One metadata entry only: safetensors writes several in random order.
    """
    # safetensors refuses tensors that share memory, and tied modules share their A; the others
    # are not copied: full weights and their moments are three times the model
    seen: set[int] = set()
    held: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        held[name] = tensor.detach().clone() if storage in seen else tensor.detach()
        held[name] = held[name].contiguous()
        seen.add(storage)
    return safetensors.torch.save(held, metadata=dict([metadata]))


def parse_tensors(data: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors in sorted order, and metadata. Raises CorruptFile naming `path`."""
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype torch does not have
        raise CorruptFile(f"{path}: not a readable safetensors file: {error}") from error
    size = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + size])
    return dict(sorted(tensors.items())), header.get("__metadata__") or {}


def lora_modules(tensors: Mapping[str, Tensor], rank: int) -> tuple[str, ...]:
    """The modules of an adapter, each with one A [R, in] and one B [out, R], sorted.

    Raises ValueError naming the tensor that does not fit.
    """
    modules = {_module(name) for name in tensors}
    for module in modules:
        for name, axis in zip(tensor_names(module), (0, 1), strict=True):
            if name not in tensors:
                raise ValueError(f"tensor {name} is missing")
            tensor = tensors[name]
            if tensor.ndim != 2 or tensor.shape[axis] != rank:
                want = f"[{rank}, in]" if axis == 0 else f"[out, {rank}]"
                raise ValueError(f"tensor {name} has shape {list(tensor.shape)}, must be {want}")
    check_floating(tensors)
    return tuple(sorted(modules))


def check_floating(tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError naming a tensor that is not floating point, or when there is none."""
    if not tensors:
        raise ValueError("no tensors")
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"tensor {name} is {tensor.dtype}, must be floating point")


def _module(name: str) -> str:
    if name.startswith(PREFIX):
        for suffix in _SUFFIXES:
            module = name.removeprefix(PREFIX).removesuffix(suffix)
            if module and name.endswith(suffix):
                return module
    raise ValueError(
        f"tensor {name} is not one of a LoRA linear layer ({PREFIX}<module>.lora_A.weight, .lora_B)"
    )
