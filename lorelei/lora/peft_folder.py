"""An adapter as the folder that peft and the inference servers read.

adapter_config.json and adapter_model.safetensors, as peft 0.18 writes them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorelei.lora.state import AdapterState
from lorelei.lora.tensor_file import lora_modules, parse_tensors, tensor_bytes
from lorelei.store.durable import CorruptFile, StoreError, read_file, write_folder
from lorelei.store.record import json_object
from lorelei.types import AdapterSpec

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

# fields that change what the tensors mean: the values that leave them plain LoRA
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "use_dora": (None, False),
    "use_qalora": (None, False),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    # the others change the base model's weights too
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}


def write_peft_folder(
    folder: Path,
    state: AdapterState,
    base_model: str,
    beside: Mapping[str, bytes] | None = None,
) -> None:
    """Create the folder whole or not at all. Raises StoreError when it exists with content.

    beside: more files, by name.
    """
    spec = state.spec
    if spec.full:
        raise StoreError(
            f"{folder}: full weights are not a PEFT adapter; write a checkpoint folder"
        )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": spec.rank,
        "lora_alpha": int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha,
        "lora_dropout": spec.dropout,
        "use_rslora": spec.rslora,
        # full names: a suffix such as q_proj would also match the layers that are not targeted
        "target_modules": list(lora_modules(state.tensors, spec.rank)),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }
    files = {
        CONFIG: json.dumps(config, indent=2).encode() + b"\n",
        TENSORS: tensor_bytes(state.tensors, ("format", "pt")),
        **(beside or {}),
    }
    write_folder(folder, files)


def read_peft_folder(folder: Path) -> AdapterState:
    """Read a LoRA adapter; target_modules become the full names of the modules it has.

    Raises StoreError naming file and field for what is missing, damaged or not plain LoRA.
    """
    path = folder / CONFIG
    config = json_object(read_file(path), path)
    for field, allowed in _PLAIN.items():
        if (value := config.get(field)) not in allowed:
            raise StoreError(
                f"{path}: {field}: {value!r} is not supported, must be {allowed[-1]!r}; "
                "use an adapter with plain LoRA on linear layers"
            )
    rank = _number(path, config, "r", 8)
    if rank < 1 or rank != int(rank):
        raise CorruptFile(f"{path}: r: {rank!r} must be a whole number of 1 or more")
    tensors, _ = parse_tensors(read_file(folder / TENSORS), folder / TENSORS)
    if any(".lora_embedding_" in name for name in tensors):
        raise StoreError(
            f"{folder / TENSORS}: has lora_embedding tensors, embeddings are not supported; "
            "use an adapter that targets linear layers only"
        )
    try:
        modules = lora_modules(tensors, int(rank))
    except ValueError as error:
        raise CorruptFile(f"{folder / TENSORS}: {error}; check r in {CONFIG}") from error
    spec = AdapterSpec(
        rank=int(rank),
        alpha=_number(path, config, "lora_alpha", 8),
        target_modules=modules,
        rslora=config.get("use_rslora") is True,
        dropout=_number(path, config, "lora_dropout", 0.0),
    )
    return AdapterState(spec=spec, tensors=tensors)


def _number(path: Path, config: dict[str, Any], field: str, default: float) -> float:
    value = config.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CorruptFile(f"{path}: {field}: {value!r} must be a number")
    return value
