"""Which of SGLang's options follow from the run, and which models it can adapt."""

from __future__ import annotations

from collections.abc import Mapping

# options that follow from the run, and from what
DERIVED: Mapping[str, str] = {
    "model-path": "model",
    "model": "model",
    "tokenizer-path": "model",
    "skip-tokenizer-init": "model",
    "served-model-name": "model",
    "dtype": "dtype",
    "device": "this machine",
    "host": "rollout.urls",
    "port": "rollout.urls",
    "api-key": "rollout.urls",
    "admin-api-key": "rollout.urls",
    "context-length": "rollout.max_context",
    "max-running-requests": "rollout.max_running",
    "tp-size": "rollout.tensor_parallel_size",
    "tp": "rollout.tensor_parallel_size",
    "tensor-parallel-size": "rollout.tensor_parallel_size",
    "dp-size": "rollout.replicas",
    "dp": "rollout.replicas",
    "data-parallel-size": "rollout.replicas",
    "base-gpu-id": "rollout.replicas",
    "enable-lora": "lora",
    "lora-paths": "lora",
    "max-lora-rank": "lora.lora_rank and rollout.reserve_rank",
    "lora-target-modules": "lora.target_modules",
    "max-loras-per-batch": "adapters and rollout.max_head_offpolicyness",
    "max-loaded-loras": "adapters and rollout.max_head_offpolicyness",
    "sampling-backend": "what training needs",
    "enable-memory-saver": "train and rollout on one device",
    "tokenizer-worker-num": "what publishing needs",
}

# the linear layers that SGLang adapts in such models
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# of the models that transformers builds for train.kind fsdp, those that SGLang 0.5.23 has too: it
# serves others by way of transformers, and leaves adapters out there; see
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
