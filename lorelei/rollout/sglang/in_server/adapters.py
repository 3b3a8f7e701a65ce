"""Adapters that arrive as bytes or by broadcast, and the digest of what SGLang installed.

SGLang's own route of tensors carries our orders to every scheduler process, as bytes without
pickle; its pickles are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from lorelei.lora.state import PREFIX, AdapterState
from lorelei.types import AdapterSpec

SAFETENSORS = "lorelei/safetensors"  # load_format of an order with the tensors in its body

_SUFFIXES = (".lora_A.weight", ".lora_B.weight")


class Refused(ValueError):
    """An adapter that SGLang would serve wrongly, or die of."""


def adapter_config(spec: AdapterSpec, names: list[str]) -> dict[str, Any]:
    """The part of PEFT's adapter_config.json that SGLang reads."""
    modules = {_module(name) for name in names}
    return {
        "peft_type": "LORA",
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "use_rslora": spec.rslora,
        "target_modules": sorted({module.rsplit(".", 1)[-1] for module in modules}),
    }


def _module(name: str) -> str:
    return name.removesuffix(_SUFFIXES[0]).removesuffix(_SUFFIXES[1])


def install() -> None:
    """Hook SGLang's LoRA adapters, their manager and the worker that receives them."""
    from sglang.srt.lora.lora import LoRAAdapter
    from sglang.srt.lora.lora_manager import LoRAManager
    from sglang.srt.managers.io_struct import LoRAUpdateOutput
    from sglang.srt.managers.tp_worker import BaseTpWorker

    fuse = LoRAAdapter._normalize_weights

    def digest_then_fuse(self: Any) -> None:
        _accept(self)
        fuse(self)

    update_result = LoRAManager.create_lora_update_result

    def result_with_digests(self: Any, success: bool, error_message: str = "") -> Any:
        result = update_result(self, success, error_message)
        result.loaded_adapters = {
            ref.lora_name: self.loras[ref.lora_id].digest for ref in self.lora_refs.values()
        }
        return result

    def load_from_order(self: Any, order: Any) -> Any:
        try:
            tensors = _tensors(order)
        except ValueError as error:
            return LoRAUpdateOutput(success=False, error_message=str(error))
        return self.model_runner.load_lora_adapter_from_tensors(
            order.to_ref(), tensors, order.config_dict, None
        )

    LoRAAdapter._normalize_weights = digest_then_fuse
    LoRAManager.create_lora_update_result = result_with_digests
    BaseTpWorker.load_lora_adapter_from_tensors = load_from_order


def _tensors(order: Any) -> dict[str, Tensor]:
    (payload,) = order.serialized_named_tensors
    match order.load_format:
        case "lorelei/safetensors":
            return load_safetensors(payload)
        case other:
            raise Refused(f"load_format: {other!r} is not served here; send safetensors")


def _accept(adapter: Any) -> None:
    """Check a LoRAAdapter's tensors, note their digest, scale and complete them for SGLang."""
    config = adapter.config
    spec = AdapterSpec(
        rank=config.r,
        alpha=config.lora_alpha,
        rslora=bool(config.hf_config.get("use_rslora")),
    )
    tensors: dict[str, Tensor] = dict(adapter.embedding_layers)
    for layer in adapter.layers:
        tensors |= layer.weights
    _check(tensors, spec.rank, adapter.base_hf_config)
    adapter.digest = AdapterState(spec=spec, tensors=tensors).digest()
    adapter.scaling = spec.scale  # SGLang has no rsLoRA
    for layer in adapter.layers:
        _complete(layer.weights, spec.rank, adapter.base_hf_config)


def _features(model: Any) -> dict[str, tuple[int, int]]:
    """{projection: (inputs, outputs)} of the families that we train."""
    head = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    q, kv = model.num_attention_heads * head, model.num_key_value_heads * head
    hidden = model.hidden_size
    inner = getattr(model, "intermediate_size", hidden)
    return {
        "q_proj": (hidden, q),
        "k_proj": (hidden, kv),
        "v_proj": (hidden, kv),
        "o_proj": (q, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }


def _check(tensors: Mapping[str, Tensor], rank: int, model: Any) -> None:
    """Raises Refused for what SGLang would skip, or stumble over while it serves others."""
    features = _features(model)
    inner_of_experts = getattr(model, "moe_intermediate_size", None)
    for name, tensor in tensors.items():
        module = _module(name)
        projection = module.rsplit(".", 1)[-1]
        if module == name or not name.startswith(PREFIX) or projection not in features:
            raise Refused(f"{name}: SGLang has no place for this tensor")
        inputs, outputs = features[projection]
        if ".experts." in name and inner_of_experts is not None:
            if projection == "down_proj":
                inputs = inner_of_experts
            else:
                outputs = inner_of_experts
        shape = (rank, inputs) if name.endswith(_SUFFIXES[0]) else (outputs, rank)
        if tuple(tensor.shape) != shape:
            raise Refused(f"{name}: has shape {tuple(tensor.shape)}, the model needs {shape}")
    missing = {n.replace("lora_A", "lora_B") for n in tensors if "lora_A" in n} ^ {
        n for n in tensors if "lora_B" in n
    }
    if missing:
        raise Refused(f"{min(missing)}: A without B, or B without A")


def _complete(weights: dict[str, Tensor], rank: int, model: Any) -> None:
    """Add zeros for the untargeted ones of q, k, v and of gate, up, which SGLang fuses."""
    features = _features(model)
    for name in list(weights):
        for fused in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            for here in fused:
                if f".{here}." not in name:
                    continue
                for other in fused:
                    twin = name.replace(f".{here}.", f".{other}.")
                    if twin not in weights:
                        rows = len(weights[name])
                        if name.endswith(_SUFFIXES[1]) and len(fused) == 3:
                            rows = features[other][1]
                        weights[twin] = torch.zeros(
                            rows, weights[name].shape[1], dtype=weights[name].dtype
                        )


def spec_header(spec: AdapterSpec) -> str:
    """A spec as the text that travels in a safetensors header."""
    return json.dumps({"rank": spec.rank, "alpha": spec.alpha, "rslora": spec.rslora})
