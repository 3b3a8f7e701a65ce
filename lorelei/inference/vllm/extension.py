"""Runs inside vLLM's workers: adapters from memory, exact scores, and what was installed.

vLLM reads adapters from folders. Here a path 'lorelei://NAME' means one that came by HTTP,
broadcast or in a folder, and was read and checked in the background; it goes through vLLM's own
loading, so that its caches may drop it and load it again. Written for vLLM 0.32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.lora import worker_manager
from vllm.lora.peft_helper import PEFTHelper
from vllm.model_executor.layers.fused_moe import layer as fused_moe_layer
from vllm.platforms import current_platform
from vllm.v1.worker import gpu_model_runner

from lorelei.inference.server.broadcast import Group, Receiver
from lorelei.inference.server.payload import BROADCAST, FOLDER, from_wire
from lorelei.inference.vllm.preparation import Preparation
from lorelei.lora.state import AdapterState

SCHEME = "lorelei://"

_held: dict[str, Preparation] = {}  # by name
_installed: dict[str, str | None] = {}  # digest of the tensors last handed to vLLM, by name
_receiver = Receiver()


class Extension:
    """Methods that vLLM mixes into its worker; the API server calls them on all workers at once.

    What is refused is returned as {"refused": why}: an exception here may end the engine.
    """

    def lorelei_facts(self) -> dict[str, Any]:
        runner = self.model_runner  # type: ignore[attr-defined]
        layers = runner.lora_manager._adapter_manager.modules
        hooked = hasattr(runner, "_lorelei_scores")
        plain_head = not any("logits_processor" in name for name in layers)
        return {"scores": hooked and plain_head}

    def lorelei_load(self, name: str, kind: str, body: bytes) -> dict[str, Any]:
        """Start to prepare a payload; for a broadcast, `lorelei_receive` has."""
        if kind == BROADCAST:
            return {}
        return self._lorelei_prepare(name, lambda: from_wire(kind, body), again=kind == FOLDER)

    def lorelei_prepared(self, name: str) -> dict[str, Any]:
        """{} when it is ready, {"waiting": True}, {"missing": why} or {"refused": why}."""
        preparation = _held.get(name)
        if preparation is None:
            return {"missing": "none is announced"}
        if not preparation.prepared.done():
            return {"waiting": True}
        error = preparation.prepared.exception()
        if error is None:
            return {}
        del _held[name]
        return {"refused" if isinstance(error, ValueError) else "missing": str(error)}

    def lorelei_join(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Start to form a broadcast group; does not wait for it."""
        group = Group(**asked)
        rank = group.first_rank + self.rank  # type: ignore[attr-defined]
        _receiver.join(group, rank, self.model_runner.device)  # type: ignore[attr-defined]
        return {}

    def lorelei_receive(self, name: str, group: str, size: int) -> dict[str, Any]:
        """Start to receive an adapter of `size` bytes and to prepare it; does not wait for it."""
        try:
            arrival = _receiver.receive(name, group, size)
        except ValueError as error:
            return {"refused": str(error)}
        return self._lorelei_prepare(name, lambda: from_wire(BROADCAST, arrival.result()))

    def lorelei_leave(self, group: str) -> dict[str, Any]:
        """Give up a group; workers that wait in it wake up."""
        for name in _receiver.leave(group):
            if name in _held and not _held[name].ready:
                del _held[name]
        return {}

    def lorelei_digest(self, name: str) -> dict[str, Any]:
        """The digest of the tensors that vLLM was given under a name."""
        return {"digest": _installed.get(name)}

    def lorelei_forget(self, name: str) -> dict[str, Any]:
        """Drop what is kept of an adapter."""
        for known in (_held, _installed, _receiver.coming):
            known.pop(name, None)
        return {}

    def _lorelei_prepare(
        self, name: str, read: Callable[[], AdapterState], again: bool = False
    ) -> dict[str, Any]:
        manager = self.model_runner.lora_manager  # type: ignore[attr-defined]
        _held[name] = Preparation(read, lambda state: _check(manager, state), again)
        return {}


def _check(manager: Any, state: AdapterState) -> None:
    """Raises ValueError for what vLLM would refuse, or silently leave out."""
    allowed = manager.lora_config.max_lora_rank
    if state.spec.rank > allowed:
        raise ValueError(f"rank {state.spec.rank} is more than the server's {allowed}")
    layers = manager._adapter_manager
    mapper = _mapper(layers.model)
    for module in state.spec.target_modules:
        # the names of vLLM's own modules: q, k and v are one, and so are all experts
        known = (mapper.map_name(module) if mapper is not None else None) or module
        if not any(name in layers.modules for name in _layer_names(known, layers)):
            raise ValueError(
                f"module {module} has no LoRA layer in this server, which would silently leave it "
                "out; target other modules, or use another rollout engine"
            )
    wrong = [n for n, tensor in state.tensors.items() if not torch.isfinite(tensor).all()]
    if wrong:
        raise ValueError(f"tensor {wrong[0]} is not finite")
    for name, tensor in state.tensors.items():
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"tensor {name} is {tensor.dtype}")


def _layer_names(module: str, layers: Any) -> Iterator[str]:
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
    if not request.lora_path.startswith(SCHEME):
        return _load_as_vllm_does(self, request)
    name = request.lora_path.removeprefix(SCHEME)
    preparation = _held[name]
    spec = preparation.prepared.result()  # the routes have waited for it
    helper = PEFTHelper.from_dict(
        {
            "r": spec.rank,
            "lora_alpha": spec.alpha,
            "use_rslora": spec.rslora,
            "target_modules": list(spec.target_modules),
        }
    )
    helper.validate_legal(self.lora_config)
    layers = self._adapter_manager
    model = self._lora_model_cls.from_lora_tensors(
        lora_model_id=request.lora_int_id,
        tensors=preparation.tensors(),
        peft_helper=helper,
        device="cpu",
        dtype=self.lora_config.lora_dtype,
        model_vocab_size=self.vocab_size,
        weights_mapper=_mapper(layers.model),
        skip_prefixes=getattr(layers.model, "lora_skip_prefixes", None),
    )
    model.is_3d_lora_weight = request.is_3d_lora_weight
    layers._validate_moe_lora_format(model)
    _installed[name] = preparation.digest
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

    # a prompt that is computed in pieces is sampled after each piece, needlessly; vLLM then turns
    # the request's random numbers back by a call that a CPU's generator does not have
    _sample_as_vllm_does = gpu_model_runner.GPUModelRunner._sample
    _keep_books_as_vllm_does = gpu_model_runner.GPUModelRunner._bookkeeping_sync

    def _sample(self: Any, *args: Any, **options: Any) -> Any:
        unused = self.discard_request_mask.np[: self.input_batch.num_reqs].nonzero()[0]
        generators = [self.input_batch.generators.get(int(row)) for row in unused]
        before = [(each, each.get_state()) for each in generators if each is not None]
        sampled = _sample_as_vllm_does(self, *args, **options)
        for generator, state in before:
            generator.set_state(state)
        return sampled

    def _keep_books(self: Any, *args: Any, **options: Any) -> Any:
        generators, self.input_batch.generators = self.input_batch.generators, {}
        try:
            return _keep_books_as_vllm_does(self, *args, **options)
        finally:
            self.input_batch.generators = generators

    gpu_model_runner.GPUModelRunner._sample = _sample
    gpu_model_runner.GPUModelRunner._bookkeeping_sync = _keep_books
