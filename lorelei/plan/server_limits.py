"""What servers would ignore or die of, known before anything starts. No torch."""

from __future__ import annotations

from collections.abc import Iterable

from lorelei.config.errors import ConfigError
from lorelei.config.rollout import ServerRollout, SglangRollout
from lorelei.config.run import RunConfig
from lorelei.config.sglang_options import ARCHITECTURES, PROJECTIONS, WITH_WINDOWS
from lorelei.config.vllm_options import WITHOUT_ADAPTERS, rank_at_least
from lorelei.model.config import ModelSizes

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # of vLLM's attention
SGLANG_PADDING = 32  # on a CPU, of each process's share of an MLP
INNER = ("gate_proj", "up_proj", "down_proj")


def check_servers(
    config: RunConfig, model: ModelSizes, modules: Iterable[str], on_cpu: bool
) -> None:
    """Raises ConfigError with the reason. modules: that any adapter has."""
    rollout = config.rollout
    if not isinstance(rollout, ServerRollout):
        return
    modules = list(modules)
    _check_model(rollout, model, modules, on_cpu)
    experts = next((name for name in modules if ".experts." in name), None)
    if experts is not None and on_cpu:
        fate = "leaves them out without a word" if rollout.kind == "vllm" else "dies of them"
        raise ConfigError(
            f"lora.target_modules: {experts} is of an expert, and {rollout.kind} on a CPU {fate}; "
            "target q_proj, k_proj, v_proj and o_proj only, or use rollout.kind: embedded"
        )
    if "lm_head" in modules:
        raise ConfigError(
            f"lora.target_modules: lm_head cannot be adapted with rollout.kind {rollout.kind}; "
            "leave it out, or use rollout.kind: embedded"
        )
    if model.heads % rollout.tensor_parallel_size:
        raise ConfigError(
            f"rollout.tensor_parallel_size: {rollout.tensor_parallel_size} processes cannot share "
            f"{model.heads} attention heads; use a divisor"
        )
    if rollout.kind == "sglang" and on_cpu:
        _check_padding(model, modules, rollout.tensor_parallel_size)
    if rollout.kind == "vllm":
        if on_cpu and model.head_dim not in CPU_HEAD_SIZES:
            raise ConfigError(
                f"rollout.kind: vllm on a CPU dies of the first request to a model with head_dim "
                f"{model.head_dim}; it can do {', '.join(map(str, CPU_HEAD_SIZES))}"
            )
        for e in config.experiments():
            rank_at_least(max(e.lora.lora_rank, rollout.reserve_rank))


def _check_model(
    rollout: ServerRollout, model: ModelSizes, modules: Iterable[str], on_cpu: bool
) -> None:
    """Whether the kind of server has the architecture, with all that it does, and adapts it."""
    name = model.architecture
    if not isinstance(rollout, SglangRollout):
        if name in WITHOUT_ADAPTERS:
            raise ConfigError(
                f"model: {name} has no place for adapters in vLLM; use rollout.kind: sglang where "
                "it has the model, or a model of another architecture"
            )
        return
    if name not in ARCHITECTURES:
        raise ConfigError(
            f"model: {name} is none of SGLang's own models, and it leaves adapters of others out "
            "without a word; use rollout.kind: vllm"
        )
    context = min(rollout.max_context or model.max_positions, model.max_positions)
    if model.window is not None and model.window < context and name not in WITH_WINDOWS:
        raise ConfigError(
            f"rollout.max_context: {context} tokens are more than the attention window of "
            f"{model.window} that {name} has and SGLang does not keep to; lower it to "
            f"{model.window}, or use rollout.kind: vllm"
        )
    if model.softcap is not None and on_cpu:
        raise ConfigError(
            f"model: SGLang on a CPU leaves out the attn_logit_softcapping {model.softcap:g} of "
            f"{name}; use rollout.kind: vllm"
        )
    leaves = {module.rpartition(".")[2] for module in modules} - {*PROJECTIONS, "lm_head"}
    if leaves:
        raise ConfigError(
            f"lora.target_modules: {', '.join(sorted(leaves))} of {name} cannot be adapted with "
            f"rollout.kind sglang, only {', '.join(PROJECTIONS)}; target these, or use "
            "rollout.kind: vllm"
        )


def _check_padding(model: ModelSizes, modules: Iterable[str], processes: int) -> None:
    """SGLang on a CPU fills up layers that do not divide, and adapters no longer fit them."""
    if processes == 1:
        return
    if model.kv_heads % processes:
        raise ConfigError(
            f"rollout.tensor_parallel_size: {processes} processes cannot share "
            f"{model.kv_heads} key and value heads in SGLang on a CPU; use a divisor"
        )
    multiple = processes * SGLANG_PADDING
    adapts_mlps = any(module.endswith(INNER) for module in modules)
    if adapts_mlps and model.intermediate % multiple:
        raise ConfigError(
            f"rollout.tensor_parallel_size: in SGLang on a CPU {processes} processes can share "
            f"adapted MLPs of a multiple of {multiple} features, not "
            f"{model.intermediate}; use 1, or target q_proj, k_proj, v_proj and o_proj only"
        )
