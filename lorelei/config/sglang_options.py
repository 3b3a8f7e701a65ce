"""Which of SGLang's options follow from the run."""

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
