"""Runs inside vLLM's workers: adapters from memory, exact scores, and what was installed.

vLLM reads adapters from folders. Here a path 'mem://NAME' means tensors that came by HTTP or
broadcast, 'peft://FOLDER' a PEFT folder; both go through vLLM's own loading, so that its caches
may drop and load them again. Written for vLLM 0.32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from vllm.lora import worker_manager
from vllm.lora.peft_helper import PEFTHelper
from vllm.model_executor.layers.fused_moe import layer as fused_moe_layer
from vllm.platforms import current_platform
from vllm.v1.worker import gpu_model_runner

from lorelei.lora.state import AdapterState
from lorelei.rollout.server.arrival import Arrival, Meeting
from lorelei.rollout.server.payload import unpack
from lorelei.store.peft_folder import read_peft_folder

MEMORY, FOLDER = "mem://", "peft://"

_held: dict[str, AdapterState] = {}  # by name; what mem:// paths mean
_installed: dict[str, str] = {}  # digest of the tensors last handed to vLLM, by path
_receiving: dict[str, Arrival] = {}  # by name
_groups: dict[str, Meeting] = {}  # by name


class Extension:
    """Methods that vLLM mixes into its worker; the API server calls them on all workers at once.

    What is refused is returned as {"refused": why}: an exception here may end the engine.
    """

    def lorelei_facts(self) -> dict[str, Any]:
        runner = self.model_runner  # type: ignore[attr-defined]
        layers = runner.lora_manager._adapter_manager.modules
        hooked = hasattr(runner, "_lorelei_scores")
        plain_head = not any("logits_processor" in name for name in layers)
        return {"device": runner.device.type, "scores": hooked and plain_head}

    def lorelei_store(self, name: str, data: bytes) -> dict[str, Any]:
        """Keep an adapter's bytes as mem://name."""
        return self._lorelei_keep(name, data)

    def lorelei_check_folder(self, folder: str) -> dict[str, Any]:
        """Whether a PEFT folder could be installed."""
        try:
            _check(self.model_runner.lora_manager, read_peft_folder(Path(folder)))  # type: ignore[attr-defined]
        except ValueError as error:
            return {"refused": str(error)}
        return {}

    def lorelei_join(
        self, name: str, host: str, port: int, size: int, first: int, backend: str, timeout: float
    ) -> dict[str, Any]:
        """Start to meet a broadcast group; does not wait for it."""
        if name not in _groups:
            rank = first + self.rank  # type: ignore[attr-defined]
            device = self.model_runner.device  # type: ignore[attr-defined]
            _groups[name] = Meeting((name, host, port, size, rank, backend, timeout), device)
        return {}

    def lorelei_receive(self, name: str, group: str, size: int) -> dict[str, Any]:
        """Start to receive an adapter of `size` bytes as mem://name; does not wait for it."""
        if group not in _groups:
            return {"refused": f"there is no broadcast group {group}"}
        _receiving[name] = Arrival(_groups[group], size)
        return {}

    def lorelei_arrived(self, name: str) -> dict[str, Any]:
        """How a broadcast stands: {"waiting": True}, {"missing": True}, or that it is kept."""
        arrival = _receiving.get(name)
        if arrival is None:
            return {} if name in _held else {"missing": True, "why": "none is announced"}
        if arrival.running:
            return {"waiting": True}
        del _receiving[name]
        if arrival.data is None:
            return {"missing": True, "why": arrival.error}
        return self._lorelei_keep(name, arrival.data)

    def lorelei_leave(self, group: str) -> dict[str, Any]:
        """Give up a group; who still waits in it wakes up."""
        meeting = _groups.pop(group, None)
        if meeting is not None:
            meeting.abort()
            for name in [n for n, a in _receiving.items() if a.meeting is meeting]:
                del _receiving[name]
        return {}

    def lorelei_digest(self, path: str) -> dict[str, Any]:
        """The digest of the tensors that vLLM was given for a path."""
        return {"digest": _installed.get(path)}

    def lorelei_forget(self, name: str, path: str) -> dict[str, Any]:
        """Drop what is kept of an adapter."""
        _held.pop(name, None)
        _receiving.pop(name, None)
        _installed.pop(path, None)
        return {}

    def _lorelei_keep(self, name: str, data: bytes) -> dict[str, Any]:
        try:
            state = unpack(data)
            _check(self.model_runner.lora_manager, state)  # type: ignore[attr-defined]
        except ValueError as error:
            return {"refused": str(error)}
        _held[name] = state
        return {}


def _check(manager: Any, state: AdapterState) -> None:
    """Raises ValueError for what vLLM would refuse, or leave out without a word."""
    allowed = manager.lora_config.max_lora_rank
    if state.spec.rank > allowed:
        raise ValueError(f"rank {state.spec.rank} is more than the server's {allowed}")
    layers = manager._adapter_manager
    mapper = _mapper(layers.model)
    for module in state.spec.target_modules:
        # the names of vLLM's own modules: q, k and v are one, and so are all experts
        known = (mapper.map_name(module) if mapper is not None else None) or module
        if not any(place in layers.modules for place in _places(known, layers)):
            raise ValueError(
                f"module {module} has no LoRA layer in this server, which would leave it out "
                "without a word; target other modules, or use another rollout engine"
            )
    wrong = [n for n, tensor in state.tensors.items() if not torch.isfinite(tensor).all()]
    if wrong:
        raise ValueError(f"tensor {wrong[0]} is not finite")
    for name, tensor in state.tensors.items():
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"tensor {name} is {tensor.dtype}")


def _places(module: str, layers: Any) -> Iterator[str]:
    parent, _, leaf = module.rpartition(".")
    yield module
    for packed, parts in layers.packed_modules_mapping.items():
        if leaf in parts:
            yield f"{parent}.{packed}"
    if ".experts." in module:
        yield module.partition(".experts.")[0] + ".experts"


def _mapper(model: Any) -> Any:
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    return mapper.get_rename_mapper() if mapper is not None else None


_load_as_vllm_does = worker_manager.WorkerLoRAManager._load_adapter


def _load_adapter(self: Any, request: Any) -> Any:
    """vLLM's own, and for our paths the same from tensors."""
    path: str = request.lora_path
    if path.startswith(MEMORY):
        state = _held[path.removeprefix(MEMORY)]
    elif path.startswith(FOLDER):
        state = read_peft_folder(Path(path.removeprefix(FOLDER)))
    else:
        return _load_as_vllm_does(self, request)
    helper = PEFTHelper.from_dict(
        {
            "r": state.spec.rank,
            "lora_alpha": state.spec.alpha,
            "use_rslora": state.spec.rslora,
            "target_modules": list(state.spec.target_modules),
        }
    )
    helper.validate_legal(self.lora_config)
    layers = self._adapter_manager
    model = self._lora_model_cls.from_lora_tensors(
        lora_model_id=request.lora_int_id,
        # copies: vLLM scales B in place
        tensors={name: tensor.clone() for name, tensor in state.tensors.items()},
        peft_helper=helper,
        device="cpu",
        dtype=self.lora_config.lora_dtype,
        model_vocab_size=self.vocab_size,
        weights_mapper=_mapper(layers.model),
        skip_prefixes=getattr(layers.model, "lora_skip_prefixes", None),
    )
    model.is_3d_lora_weight = request.is_3d_lora_weight
    layers._validate_moe_lora_format(model)
    _installed[path] = state.digest()
    return model


worker_manager.WorkerLoRAManager._load_adapter = _load_adapter


_prompt_logprobs_as_vllm_does = gpu_model_runner.GPUModelRunner._get_prompt_logprobs_dict


def _prompt_logprobs(self: Any, hidden_states: Any, scheduled: Any) -> dict[str, Any]:
    """vLLM's own, of the temperature-scaled distribution: it leaves the temperature out."""
    found: dict[str, Any] = {}
    asked = self.num_prompt_logprobs
    for name in list(asked):
        temperature = self.requests[name].sampling_params.temperature or 1.0
        self.num_prompt_logprobs = {name: asked[name]}
        with _scaled(self.sampler, temperature):
            found |= _prompt_logprobs_as_vllm_does(self, hidden_states, scheduled)
        if name not in self.num_prompt_logprobs:
            del asked[name]
    self.num_prompt_logprobs = asked
    return found


@contextmanager
def _scaled(sampler: Any, temperature: float) -> Iterator[None]:
    plain = type(sampler).compute_logprobs
    sampler.compute_logprobs = lambda logits: plain(logits.float() / temperature)
    try:
        yield
    finally:
        del sampler.compute_logprobs


gpu_model_runner.GPUModelRunner._get_prompt_logprobs_dict = _prompt_logprobs
gpu_model_runner.GPUModelRunner._lorelei_scores = True


if current_platform.is_cpu():
    # with LoRA on, the CPU build chooses kernels for experts that it does not have
    _config_of_experts = fused_moe_layer.FusedMoEConfig

    def _without_expert_adapters(*args: Any, **options: Any) -> Any:
        return _config_of_experts(*args, **{**options, "is_lora_enabled": False})

    fused_moe_layer.FusedMoEConfig = _without_expert_adapters
