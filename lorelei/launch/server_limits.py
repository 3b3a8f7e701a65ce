"""What servers would ignore or die of, known before anything starts. No torch."""

from __future__ import annotations

from collections.abc import Iterable

from lorelei.config.errors import ConfigError
from lorelei.config.rollout import ServerRollout
from lorelei.config.run import RunConfig
from lorelei.config.vllm_options import rank_at_least
from lorelei.model.config import DecoderConfig

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # of vLLM's attention


def check_servers(
    config: RunConfig, model: DecoderConfig, modules: Iterable[str], on_cpu: bool
) -> None:
    """Raises ConfigError with the reason. modules: that any adapter has."""
    rollout = config.rollout
    if not isinstance(rollout, ServerRollout):
        return
    modules = list(modules)
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
    if rollout.kind == "vllm":
        if on_cpu and model.head_dim not in CPU_HEAD_SIZES:
            raise ConfigError(
                f"rollout.kind: vllm on a CPU dies of the first request to a model with head_dim "
                f"{model.head_dim}; it can do {', '.join(map(str, CPU_HEAD_SIZES))}"
            )
        for e in config.experiments():
            rank_at_least(max(e.lora.lora_rank, rollout.reserve_rank))
