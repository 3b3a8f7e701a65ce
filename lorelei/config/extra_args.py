"""Options of servers that we do not model, and those that follow from the run."""

from __future__ import annotations

from collections.abc import Mapping

from lorelei.config.errors import FieldError

# options that follow from the run, and from what
VLLM: Mapping[str, str] = {
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

SGLANG: Mapping[str, str] = {
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

DERIVED: Mapping[str, Mapping[str, str]] = {"vllm": VLLM, "sglang": SGLANG}


def check_extra_args(derived: Mapping[str, str], extra_args: Mapping[str, object]) -> None:
    """Raises FieldError for an option that follows from the run: one of `derived`."""
    for name in extra_args:
        plain = name.strip("-").replace("_", "-")
        if plain in derived:
            raise FieldError(
                f"extra_args.{name}", f"follows from {derived[plain]}; remove it and set that"
            )
