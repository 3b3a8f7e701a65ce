"""The tensors of an adapter's folder, without copies of the base's weights."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lorelei.lora.state import PREFIX
from lorelei.lora.tensor_file import parse_tensors
from lorelei.store.durable import CorruptFile, StoreError, read_file

SAFETENSORS, BIN = "adapter_model.safetensors", "adapter_model.bin"
_LFS = b"version https://git-lfs"

# a part of a tensor's name -> what it is, and what to do
_REASONS = {
    ".lora_embedding_": "embeddings are not supported; use an adapter on linear layers only",
    ".lora_magnitude_vector": "is DoRA's; use an adapter that was trained with use_dora=False",
    ".modules_to_save.": "is a whole trained module; make it one of target_modules instead",
    ".lora_A.default.": "has the adapter's name in it; write it with peft's save_pretrained",
    ".lora_B.default.": "has the adapter's name in it; write it with peft's save_pretrained",
    "_orig_mod.": "is of a compiled module; save the module that was compiled",
    "_fsdp_wrapped_module.": "is of an FSDP wrapper; save its full state dict with peft",
}


def read_tensors(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The file and its tensors. Raises CorruptFile naming it."""
    path = folder / SAFETENSORS
    if not path.exists() and (folder / BIN).exists():
        path = folder / BIN
    data = read_file(path)
    if data.startswith(_LFS):
        raise CorruptFile(f"{path}: is a Git LFS pointer, not the file; run git lfs pull")
    return path, parse_tensors(data, path)[0] if path.name == SAFETENSORS else _unpickled(
        data, path
    )


def plain_tensors(
    path: Path, tensors: Mapping[str, Tensor], base: Path | None
) -> dict[str, Tensor]:
    """The LoRA tensors. Raises StoreError for others, unless they are the base's own.

    peft saves a copy of the base's weight beside LoRA on lm_head.
    """
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if reason := next((why for part, why in _REASONS.items() if part in name), None):
            raise StoreError(f"{path}: {name}: {reason}")
        if ".lora_" not in name and name.startswith(PREFIX):
            _check_copy(path, name, tensor, base)
            continue
        if tensor.dtype.is_floating_point and not tensor.float().isfinite().all():
            bad = int((~tensor.float().isfinite()).sum())
            raise StoreError(
                f"{path}: {name}: {bad} of {tensor.numel()} values are NaN or infinite in float32;"
                " take an earlier checkpoint"
            )
        kept[name] = tensor
    return kept


def _check_copy(path: Path, name: str, tensor: Tensor, base: Path | None) -> None:
    from lorelei.model.load import open_tensors, shards  # servers' workers do without it

    own = name.removeprefix(PREFIX).replace(".base_layer.", ".")
    with ExitStack() as files:
        held = open_tensors(shards(base), files) if base is not None else {}
        if own == "lm_head.weight" and own not in held:
            own = "model.embed_tokens.weight"  # the head of a tied base
        weight = held[own].get_tensor(own) if own in held else None
    if weight is None:
        raise StoreError(
            f"{path}: {name} is not one of a LoRA linear layer ({PREFIX}<module>.lora_A.weight, "
            ".lora_B), nor a weight of the model; remove it"
        )
    same = weight.shape == tensor.shape and torch.equal(weight.to(tensor.dtype), tensor)
    if not same and own.endswith(".bias"):
        raise StoreError(f"{path}: {name}: is a trained bias; train with bias='none'")
    if not same:
        raise StoreError(
            f"{path}: {name}: is {list(tensor.shape)} and not the model's own {own} "
            f"{list(weight.shape)}; take the base that the adapter was trained on as model, with "
            "its added tokens"
        )


def _unpickled(data: bytes, path: Path) -> dict[str, Tensor]:
    try:
        # weights_only: a pickle can run any code
        found: Any = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler stumbles on in a damaged file
        reason = str(error).partition("\n")[0]
        raise CorruptFile(
            f"{path}: not a file of tensors that torch.load reads with weights_only: {reason}; "
            f"save the adapter as {SAFETENSORS}"
        ) from error
    if not isinstance(found, dict):
        raise CorruptFile(f"{path}: holds {type(found).__name__}, not tensors by name")
    entries = cast(dict[Any, Any], found)
    for name, tensor in entries.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CorruptFile(f"{path}: {name!r} is not a tensor with a name")
    return dict(sorted(entries.items()))
