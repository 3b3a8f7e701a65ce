"""Full weights as the checkpoint folder that transformers reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorelei.lora.state import AdapterState
from lorelei.lora.tensor_file import tensor_bytes
from lorelei.store.durable import StoreError, read_file, write_folder

CONFIG, TENSORS = "config.json", "model.safetensors"
_BESIDE = {".json", ".txt", ".model", ".jinja"}  # tokenizer, chat template, generation config


def write_model_folder(
    folder: Path, state: AdapterState, base: Path, config: Mapping[str, Any]
) -> None:
    """Create the folder whole or not at all.

    base: the model's folder, whose files beside the weights go along. config: its config.json,
    parsed. Raises StoreError when the folder exists with content, or for a LoRA adapter.
    """
    if not state.spec.full:
        raise StoreError(f"{folder}: a LoRA adapter is no checkpoint; write it as a PEFT folder")
    beside = [
        path
        for path in sorted(base.iterdir())
        if path.suffix in _BESIDE and not path.name.endswith(".index.json")
    ]
    # else a loader would round the trained weights to the dtype that the base came in
    own = {k: v for k, v in config.items() if k != "torch_dtype"} | {"dtype": "float32"}
    files = {path.name: read_file(path) for path in beside if path.is_file()}
    files[CONFIG] = json.dumps(own, indent=2).encode() + b"\n"
    files[TENSORS] = tensor_bytes(state.tensors, ("format", "pt"))
    write_folder(folder, files)
