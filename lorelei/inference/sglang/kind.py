"""SGLang's description: its limits and the room it makes. Written for SGLang 0.5.23. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorelei.config.errors import ConfigError
from lorelei.config.rollout import AnyServer, SglangRollout
from lorelei.config.run import RunConfig
from lorelei.inference.kind import ServerKind, Slots
from lorelei.inference.server.options import ServerOptions, check_server
from lorelei.model.config import ModelSizes

if TYPE_CHECKING:
    from lorelei.inference.server.backend import ServerBackend

SPARE = 8  # SGLang takes prompts and answers that end a few tokens before its context
PADDING = 32  # on a CPU, of each process's share of an MLP
INNER = ("gate_proj", "up_proj", "down_proj")
# the linear layers that SGLang adapts in such models
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", *INNER)

# of the models that transformers builds for train.kind fsdp, those that SGLang has too: it serves
# others by way of transformers, and leaves adapters out there; see
# tests/unit/inference/test_server_models.py
WITH_WINDOWS = frozenset(  # which keep to a window of the attention
    f"{name}ForCausalLM"
    for name in (
        *("Afmoe", "Cohere", "Cohere2", "Cohere2Moe", "Exaone4", "ExaoneMoe", "Gemma2", "Gemma3"),
        *("Gemma3n", "Gemma4", "Gemma4Assistant", "Gemma4UnifiedAssistant", "GptOss", "Granite"),
        *("GraniteMoe", "GraniteMoeShared", "Laguna", "Mellum", "Olmo2"),
    )
)
ARCHITECTURES = WITH_WINDOWS | {
    *(
        f"{name}ForCausalLM"
        for name in (
            *("Apertus", "Arcee", "Dbrx", "DeepseekV2", "DeepseekV3", "DeepseekV32", "DeepseekV4"),
            *("Ernie4_5_Moe", "Gemma", "Glm4", "Glm4Moe", "Glm4MoeLite", "GlmMoeDsa"),
            *("GraniteMoeHybrid", "HYV3", "HrmText", "HunYuanDenseV1", "HunYuanMoEV1", "Lfm2"),
            *("Lfm2Moe", "Llama", "Llama4", "LongcatFlash", "MiniMaxM2", "Ministral3", "Mistral"),
            *("Mixtral", "OPT", "Olmo", "Olmoe", "Persimmon", "Phi", "Phi3", "Qwen2", "Qwen2Moe"),
            *("Qwen3", "Qwen3Moe", "Starcoder2"),
        )
    ),
    "GPT2LMHeadModel",
}


def slots(versions: int, rank: int) -> Slots:
    """Room for adapter versions: the base model takes one too."""
    return Slots(versions=versions + 1, rank=rank)


def cpu_cache_tokens(
    model: ModelSizes, dtype: str, context: int, max_running: int, gib: int
) -> int:
    """Tokens of a CPU server's cache: those of all running sequences, within so much memory."""
    longest = context + SPARE
    return max(min(max_running * longest, (gib << 30) // model.cache_bytes(dtype)), longest)


def check(config: RunConfig, model: ModelSizes, modules: Sequence[str], on_cpu: bool) -> None:
    """See InferenceKind."""
    rollout, name = config.rollout, model.architecture
    assert isinstance(rollout, SglangRollout), "INFERENCE[rollout.kind]"
    if name not in ARCHITECTURES:
        raise ConfigError(
            f"model: {name} is none of SGLang's own models, and it silently leaves adapters of "
            "others out; use rollout.kind: vllm"
        )
    context = model.context(rollout.max_context)
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
    check_server(rollout, "sglang", model, modules, "crashes on them" if on_cpu else "")
    if on_cpu and rollout.tensor_parallel_size > 1:
        _check_padding(model, modules, rollout.tensor_parallel_size)


def _check_padding(model: ModelSizes, modules: Sequence[str], processes: int) -> None:
    """SGLang on a CPU pads layers that do not divide, and adapters no longer fit them."""
    if model.kv_heads % processes:
        raise ConfigError(
            f"rollout.tensor_parallel_size: {processes} processes cannot share "
            f"{model.kv_heads} key and value heads in SGLang on a CPU; use a divisor"
        )
    multiple = processes * PADDING
    adapts_mlps = any(module.endswith(INNER) for module in modules)
    if adapts_mlps and model.intermediate % multiple:
        raise ConfigError(
            f"rollout.tensor_parallel_size: in SGLang on a CPU {processes} processes can share "
            f"adapted MLPs of a multiple of {multiple} features, not "
            f"{model.intermediate}; use 1, or target q_proj, k_proj, v_proj and o_proj only"
        )


def _backend(options: ServerOptions | None) -> ServerBackend:
    from lorelei.inference.sglang.backend import SglangBackend

    return SglangBackend(options)


def _cpu_cache(model: ModelSizes, dtype: str, rollout: AnyServer) -> int:
    context = model.context(rollout.max_context)
    tokens = cpu_cache_tokens(model, dtype, context, rollout.max_running, rollout.cpu_cache_gib)
    return tokens * model.cache_bytes(dtype, rollout.tensor_parallel_size)


KIND = ServerKind(
    config=SglangRollout,
    publishers=("disk", "xccl", "http"),
    check=check,
    backend=_backend,
    slots=slots,
    every_layer=False,
    memory_option="mem-fraction-static",
    memory_share=0.88,
    cpu_cache=_cpu_cache,
)
