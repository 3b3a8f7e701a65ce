"""An adapter as the folder that peft and the inference servers read.

adapter_config.json and adapter_model.safetensors, as peft 0.18 writes them; adapter_model.bin, as
earlier ones did, is read too.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lorelei.lora.fused_experts import (
    Fused,
    fused_parameters,
    lost,
    separate_experts,
)
from lorelei.lora.peft_config import PeftConfig, read_peft_config
from lorelei.lora.peft_tensors import plain_tensors, read_tensors
from lorelei.lora.state import PREFIX, AdapterState, tensor_names
from lorelei.lora.tensor_file import lora_modules, tensor_bytes
from lorelei.store.durable import CorruptFile, StoreError, write_folder
from lorelei.types import AdapterSpec

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def write_peft_folder(
    folder: Path,
    state: AdapterState,
    base_model: str,
    fused: Fused | None = None,
    beside: Mapping[str, bytes] | None = None,
) -> None:
    """Create the folder whole or not at all; `fused` replaces the tensors of single experts.

    beside: more files, by name. Raises StoreError when the folder exists with content, or a fused
    one does not hold every tensor.
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
        **(fused.config if fused is not None else {}),
    }
    tensors = fused.tensors if fused is not None else state.tensors
    files = {
        CONFIG: json.dumps(config, indent=2).encode() + b"\n",
        TENSORS: tensor_bytes(tensors, ("format", "pt")),
        **(beside or {}),
    }
    write_folder(folder, files)
    if fused is not None and (name := lost(state, read_peft_folder(folder).tensors)):
        shutil.rmtree(folder)
        raise StoreError(f"{folder}: would not hold {name} as it is trained; write single experts")


def read_peft_folder(folder: Path, base: Path | None = None) -> AdapterState:
    """Read a LoRA adapter; target_modules become the full names of the modules it has.

    base: the folder of the model, which copies of its weights in the adapter's file are compared
    with; None: such copies are refused. Raises StoreError naming file, field or tensor for what
    is missing, damaged or not plain LoRA.
    """
    config = read_peft_config(folder / CONFIG)
    path, held = read_tensors(folder)
    tensors = plain_tensors(path, held, base)
    parameters: list[str] = []
    try:
        if config.target_parameters:
            parameters = fused_parameters(tensors, config.target_parameters)
            ranks = {name: config.rank_of(name) for name in parameters}
            tensors = separate_experts(tensors, ranks, config.rank, config.peft_version)
        rank, scale = _shape(config, tensors, parameters)
        modules = lora_modules(tensors, rank)
    except StoreError:
        raise
    except ValueError as error:
        raise CorruptFile(f"{path}: {error}; check r and its patterns in {CONFIG}") from error
    alpha = config.alpha
    plain = alpha / (rank**0.5 if config.rslora else rank)
    if not math.isclose(scale, plain, rel_tol=1e-9):
        alpha = scale * (rank**0.5 if config.rslora else rank)
    spec = AdapterSpec(
        rank=rank,
        alpha=alpha,
        target_modules=modules,
        rslora=config.rslora,
        dropout=config.dropout,
    )
    return AdapterState(spec=spec, tensors=dict(sorted(tensors.items())))


def _shape(
    config: PeftConfig, tensors: dict[str, Tensor], parameters: list[str]
) -> tuple[int, float]:
    """The one rank and scale of all modules. Raises StoreError when they have several."""
    names = [n.removeprefix(PREFIX).removesuffix(".lora_A.weight") for n in tensors]
    modules = sorted(name for name in names if tensor_names(name)[0] in tensors)
    if not modules:
        return config.rank, config.scale_of("")
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    for module in modules:
        fused = [p for p in parameters if module.startswith(p.rpartition(".")[0] + ".")]
        leaf = module.rpartition(".")[2].removesuffix("_proj")
        owner = next((p for p in fused if leaf in p.rpartition(".")[2].split("_")), None)
        given = config.rank_of(module)
        ranks[module] = len(tensors[tensor_names(module)[0]]) if owner is not None else given
        scales[module] = config.scale_of(owner or module)
    for field, found in (("rank_pattern", ranks), ("alpha_pattern", scales)):
        first = modules[0]
        for module, value in found.items():
            if not math.isclose(value, found[first], rel_tol=1e-9):
                what = "rank" if field == "rank_pattern" else "alpha / r"
                raise StoreError(
                    f"{config.path}: {field}: {first} has {what} {found[first]:g} and {module} "
                    f"{value:g}, an adapter here has one; train one without patterns, or merge it "
                    "into the base and take that as model"
                )
    return ranks[modules[0]], scales[modules[0]]
