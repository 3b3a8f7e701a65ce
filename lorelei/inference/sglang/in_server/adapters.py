"""Payloads of adapters, opened in SGLang's scheduler processes, and digests of what it installed.

SGLang's own route for tensors carries our orders to every scheduler process, as bytes without
pickle; its pickles are refused. Written for SGLang 0.5.23.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from lorelei.inference.server.broadcast import Group, Receiver
from lorelei.inference.server.payload import BROADCAST, BYTES, FOLDER, from_wire
from lorelei.lora.state import PREFIX, AdapterState
from lorelei.types import AdapterSpec

SCHEME = "lorelei/"  # load_format of an order, with a kind of payload or a name of `_control`

_SUFFIXES = (".lora_A.weight", ".lora_B.weight")
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

_receiver = Receiver()
_arrivals: dict[str, Future[bytes]] = {}  # by the adapter's served name


class Refused(ValueError):
    """An adapter that SGLang would serve wrongly, or crash on."""


def install() -> None:
    """Hook SGLang's LoRA adapters, their manager and the scheduler that receives them."""
    from sglang.srt.lora.lora import LoRAAdapter
    from sglang.srt.lora.lora_manager import LoRAManager
    from sglang.srt.managers.io_struct import LoRAUpdateOutput
    from sglang.srt.managers.scheduler import Scheduler

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

    def obey(self: Any, order: Any) -> Any:
        (body,) = order.serialized_named_tensors
        runner, what = self.tp_worker.model_runner, str(order.load_format).removeprefix(SCHEME)
        try:
            if what not in (BYTES, FOLDER, BROADCAST):
                answer = _control(what, json.loads(body), runner)
                return LoRAUpdateOutput(success=True, loaded_adapters=answer)
            state = from_wire(what, _received(order.lora_name) if what == BROADCAST else body)
        except ValueError as error:
            return LoRAUpdateOutput(success=False, error_message=str(error))
        return runner.load_lora_adapter_from_tensors(
            order.to_ref(), dict(state.tensors), _config(state), None
        )

    LoRAAdapter._normalize_weights = digest_then_fuse
    LoRAManager.create_lora_update_result = result_with_digests
    Scheduler.load_lora_adapter_from_tensors = obey


def _control(what: str, asked: dict[str, Any], runner: Any) -> dict[str, str]:
    """Everything but loading. None of it waits for another process."""
    match what:
        case "join":
            from sglang.srt.runtime_context import get_parallel

            group = Group(**asked)
            rank = group.first_rank + get_parallel().tp_rank
            _receiver.join(group, rank, torch.device(runner.device))
        case "receive":
            _arrivals[asked["name"]] = _receiver.receive(**asked)
        case "arrived":
            return _standing(asked["name"])
        case "leave":
            for name in _receiver.leave(asked["group"]):
                _arrivals.pop(name, None)
        case "forget":
            for known in (_arrivals, _receiver.coming):
                known.pop(asked["name"], None)
        case other:
            raise Refused(f"load_format: {other!r} is not served here; use Lorelei's routes")
    return {}


def _standing(name: str) -> dict[str, str]:
    """How a broadcast stands: waiting, missing (and why), or there."""
    arrival = _arrivals.get(name)
    if arrival is None:
        return {"standing": "missing", "why": "none is announced"}
    if not arrival.done():
        return {"standing": "waiting"}
    if error := arrival.exception():
        del _arrivals[name]
        return {"standing": "missing", "why": str(error)}
    return {"standing": "there"}


def _received(name: str) -> bytes:
    arrival = _arrivals.pop(name, None)
    if arrival is None:
        raise Refused(f"{name}: no broadcast was announced")
    try:
        return arrival.result()  # rank 0 has it; the others within moments
    except RuntimeError as error:
        raise Refused(f"{name}: the broadcast failed: {error}") from error


def _config(state: AdapterState) -> dict[str, Any]:
    """The part of PEFT's adapter_config.json that SGLang reads."""
    return {
        "peft_type": "LORA",
        "r": state.spec.rank,
        "lora_alpha": state.spec.alpha,
        "use_rslora": state.spec.rslora,
        "target_modules": sorted({m.rsplit(".", 1)[-1] for m in state.spec.target_modules}),
    }


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
        _complete(layer.weights, adapter.base_hf_config)


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
        module = name.removesuffix(_SUFFIXES[0]).removesuffix(_SUFFIXES[1])
        projection = module.rsplit(".", 1)[-1]
        if module == name or not name.startswith(PREFIX) or projection not in features:
            raise Refused(f"{name}: SGLang has no layer for this tensor")
        inputs, outputs = features[projection]
        if ".experts." in name and inner_of_experts is not None:
            if projection == "down_proj":
                inputs = inner_of_experts
            else:
                outputs = inner_of_experts
        shape = (rank, inputs) if name.endswith(_SUFFIXES[0]) else (outputs, rank)
        if tuple(tensor.shape) != shape:
            raise Refused(f"{name}: has shape {tuple(tensor.shape)}, the model needs {shape}")
        if not torch.isfinite(tensor).all():
            raise Refused(f"{name}: is not finite")
    modules_of = [{n.removesuffix(s) for n in tensors if n.endswith(s)} for s in _SUFFIXES]
    if lone := modules_of[0] ^ modules_of[1]:
        raise Refused(f"{min(lone)}: has A without B, or B without A")


def _complete(weights: dict[str, Tensor], model: Any) -> None:
    """Add zeros for the untargeted ones of q, k, v and of gate, up, which SGLang fuses."""
    features = _features(model)
    for name, tensor in list(weights.items()):
        for fused in _FUSED:
            here = next((p for p in fused if f".{p}." in name), None)
            for other in fused if here is not None else ():
                twin = name.replace(f".{here}.", f".{other}.")
                if twin in weights:
                    continue
                # gate and up have as many outputs, in experts too; q, k and v differ
                is_b = name.endswith(_SUFFIXES[1])
                rows = features[other][1] if is_b and len(fused) == 3 else len(tensor)
                weights[twin] = torch.zeros(rows, tensor.shape[1], dtype=tensor.dtype)
