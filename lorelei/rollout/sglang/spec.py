"""How SGLang's server is started for a run: everything but the port."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorelei.rollout.server.process import Launch

LAUNCHER = "lorelei.rollout.sglang.in_server.launcher"
SPARE = 2  # SGLang wants a context longer than the longest sequence
KV_BYTES = 2 << 30  # of the cache of keys and values on a CPU

# what follows from the run, by SGLang's name: the field that decides it
DERIVED: Mapping[str, str] = {
    "model-path": "model",
    "model": "model",
    "tokenizer-path": "model",
    "served-model-name": "model",
    "dtype": "dtype",
    "host": "the loopback",
    "port": "a free port",
    "api-key": "a fresh token",
    "admin-api-key": "a fresh token",
    "device": "this machine",
    "tp-size": "rollout.tensor_parallel_size",
    "tensor-parallel-size": "rollout.tensor_parallel_size",
    "context-length": "rollout.max_context",
    "max-running-requests": "rollout.max_running",
    "enable-lora": "lora",
    "lora-paths": "lora",
    "max-lora-rank": "lora.lora_rank and rollout.reserve_rank",
    "lora-target-modules": "lora.target_modules",
    "max-loras-per-batch": "adapters and rollout.max_head_offpolicyness",
    "max-loaded-loras": "adapters and rollout.max_head_offpolicyness",
    "skip-tokenizer-init": "stop strings",
    "tokenizer-worker-num": "the loopback routes",
    "dp-size": "rollout.replicas",
    "data-parallel-size": "rollout.replicas",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SglangSpec:
    """A server's options as the run decides them."""

    python: Path  # the interpreter that has sglang
    import_path: Path  # a folder with lorelei in it and nothing else
    model: Path
    dtype: str
    device: str  # "cpu" or "cuda"
    context: int
    max_running: int
    max_rank: int
    target_modules: tuple[str, ...]  # last names of linear layers
    max_adapters: int  # different ones in one batch, the base model counted
    tensor_parallel: int = 1
    has_tokenizer: bool = True
    threads: int = 1  # of a CPU server
    extra_args: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def launch(self, number: int, port: int, token: str) -> Launch:
        """The command of replica `number`."""
        options: dict[str, Any] = {
            "model-path": self.model,
            "dtype": self.dtype,
            "host": "127.0.0.1",
            "port": port,
            "device": self.device,
            "context-length": self.context + SPARE,
            "max-running-requests": self.max_running,
            "tp-size": self.tensor_parallel,
            "max-lora-rank": self.max_rank,
            "max-loras-per-batch": self.max_adapters,
            "sampling-backend": "pytorch",
            "grammar-backend": "none",
            "log-level-http": "warning",
            "enable-lora": True,
            "sleep-on-idle": True,
            "skip-tokenizer-init": not self.has_tokenizer,
            "base-gpu-id": number * self.tensor_parallel,
            "enable-memory-saver": self.device == "cuda",
        }
        environment = {
            "PYTHONPATH": str(self.import_path),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
            "LORELEI_TOKEN": token,
        }
        if self.device == "cpu":
            options |= {
                "attention-backend": "torch_native",
                "lora-backend": "torch_native",
                "mem-fraction-static": 0.3,
                "max-total-tokens": self._cache_tokens(),
            }
            environment |= {
                "SGLANG_USE_CPU_ENGINE": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "OMP_NUM_THREADS": str(self.threads),
            }
        options |= self.extra_args
        return Launch(
            command=(
                *(str(self.python), "-P", "-m", LAUNCHER),
                *_arguments(options),
                *("--lora-target-modules", *self.target_modules),
            ),
            environment=environment,
        )

    def _cache_tokens(self) -> int:
        """Tokens of the KV cache on a CPU: those of all running sequences, within KV_BYTES."""
        config = json.loads((self.model / "config.json").read_text())
        heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        width = 4 if self.dtype == "float32" else 2
        of_token = 2 * width * heads * size * config["num_hidden_layers"]
        wanted = self.max_running * (self.context + SPARE)
        return max(min(wanted, KV_BYTES // of_token), self.context + SPARE)


def _arguments(options: Mapping[str, Any]) -> list[str]:
    """Command-line words: true is a flag, false or none is left out."""
    words: list[str] = []
    for name, value in options.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not False and value is not None:
            words += [f"--{name}", str(value)]
    return words
