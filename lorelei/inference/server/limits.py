"""What every kind of server would ignore or crash on, known before anything starts. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from lorelei.config.errors import ConfigError
from lorelei.config.rollout import AnyServer
from lorelei.model.config import ModelSizes


def check_server(
    rollout: AnyServer, kind: str, model: ModelSizes, modules: Sequence[str], cpu_experts: str
) -> None:
    """cpu_experts: what the kind does with adapted experts on a CPU; empty: not on a CPU.

    Raises ConfigError with the reason.
    """
    experts = next((name for name in modules if ".experts." in name), None)
    if experts is not None and cpu_experts:
        raise ConfigError(
            f"lora.target_modules: {experts} is of an expert, and {kind} on a CPU {cpu_experts}; "
            "target q_proj, k_proj, v_proj and o_proj only, or use rollout.kind: embedded"
        )
    if "lm_head" in modules:
        raise ConfigError(
            f"lora.target_modules: lm_head cannot be adapted with rollout.kind {kind}; "
            "leave it out, or use rollout.kind: embedded"
        )
    if model.heads % rollout.tensor_parallel_size:
        raise ConfigError(
            f"rollout.tensor_parallel_size: {rollout.tensor_parallel_size} processes cannot share "
            f"{model.heads} attention heads; use a divisor"
        )
