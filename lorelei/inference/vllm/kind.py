"""vLLM's description: its limits and the room it makes. Written for vLLM 0.32. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorelei.config.errors import ConfigError, FieldError
from lorelei.config.rollout import AnyServer, VllmRollout
from lorelei.config.run import RunConfig
from lorelei.inference.kind import ServerKind, Slots
from lorelei.inference.server.options import ServerOptions, check_server, largest_rank
from lorelei.model.config import ModelSizes

if TYPE_CHECKING:
    from lorelei.inference.server.backend import ServerBackend

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM accepts as a maximum
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # of its attention

# models that vLLM has without support for adapters; checked by
# tests/unit/inference/test_server_models.py
WITHOUT_ADAPTERS = frozenset(
    f"{name}ForCausalLM"
    for name in (
        *("BailingMoeV2_5", "BailingMoeV3", "Bloom", "Cohere2Moe", "Dbrx", "Falcon"),
        *("FalconMamba", "GPTJ", "Gemma3n", "Glm5Next", "HCXVisionV2", "HrmText"),
        *("IQuestLoopCoder", "KimiLinear", "Mamba", "Mamba2", "MiMoV2", "MiMoV2Flash"),
        *("MiniMaxM3Sparse", "Orion", "StableLm", "Step1", "Step3Text", "Step3p5", "Zamba2"),
    )
) | {"GPT2LMHeadModel"}


def slots(versions: int, rank: int) -> Slots:
    """Room for adapter versions. Raises FieldError for a rank above the largest."""
    for allowed in RANKS:
        if allowed >= rank:
            return Slots(versions=versions, rank=allowed)
    raise FieldError("reserve_rank", f"{rank} is more than vLLM's {RANKS[-1]}; lower it")


def check(config: RunConfig, model: ModelSizes, modules: Sequence[str], on_cpu: bool) -> None:
    """See InferenceKind."""
    rollout = config.rollout
    assert isinstance(rollout, VllmRollout), "INFERENCE[rollout.kind]"
    if model.architecture in WITHOUT_ADAPTERS:
        raise ConfigError(
            f"model: {model.architecture} cannot have adapters in vLLM; use rollout.kind: sglang "
            "where it has the model, or a model of another architecture"
        )
    experts = "silently leaves them out" if on_cpu else ""
    check_server(rollout, "vllm", model, modules, experts)
    if on_cpu and model.head_dim not in CPU_HEAD_SIZES:
        raise ConfigError(
            f"rollout.kind: vllm on a CPU crashes on the first request to a model with head_dim "
            f"{model.head_dim}; it can do {', '.join(map(str, CPU_HEAD_SIZES))}"
        )
    slots(1, largest_rank(config, rollout))


def _backend(options: ServerOptions | None) -> ServerBackend:
    from lorelei.inference.vllm.backend import VllmBackend

    return VllmBackend(options)


def _cpu_cache(model: ModelSizes, dtype: str, rollout: AnyServer) -> int:
    return rollout.cpu_cache_gib << 30


KIND = ServerKind(
    config=VllmRollout,
    publishers=("disk", "xccl", "http"),
    check=check,
    backend=_backend,
    slots=slots,
    every_layer=True,
    memory_option="gpu-memory-utilization",
    memory_share=0.9,
    cpu_cache=_cpu_cache,
)
