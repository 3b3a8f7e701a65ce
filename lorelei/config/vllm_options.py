"""Which of vLLM's options follow from the run, and which models it cannot adapt."""

from __future__ import annotations

from collections.abc import Mapping

from lorelei.config.errors import FieldError

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM accepts as a maximum

# options that follow from the run, and from what
DERIVED: Mapping[str, str] = {
    "model": "model",
    "tokenizer": "model",
    "served-model-name": "model",
    "dtype": "dtype",
    "host": "rollout.urls",
    "port": "rollout.urls",
    "api-key": "rollout.urls",
    "max-model-len": "rollout.max_context",
    "max-num-seqs": "rollout.max_running",
    "tensor-parallel-size": "rollout.tensor_parallel_size",
    "enable-lora": "lora",
    "max-lora-rank": "lora.lora_rank and rollout.reserve_rank",
    "max-loras": "adapters and rollout.max_head_offpolicyness",
    "max-cpu-loras": "adapters and rollout.max_head_offpolicyness",
    "lora-dtype": "dtype",
    "lora-target-modules": "lora.target_modules",
    "fully-sharded-loras": "rollout.tensor_parallel_size",
    "logprobs-mode": "what training needs",
    "worker-extension-cls": "what publishing needs",
    "middleware": "what publishing needs",
    "enable-sleep-mode": "train and rollout on one device",
}

# vLLM 0.32 has models of these without support for adapters; checked by
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


def rank_at_least(rank: int) -> int:
    """The smallest maximum that vLLM accepts. Raises FieldError above the largest."""
    for allowed in RANKS:
        if allowed >= rank:
            return allowed
    raise FieldError("reserve_rank", f"{rank} is more than vLLM's {RANKS[-1]}; lower it")
