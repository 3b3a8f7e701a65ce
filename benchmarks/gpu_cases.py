"""What the GPU benchmark runs: models by their config.json, sizes, weights and tokens.

Weights are random, made on the device from their names: every side has the same and no file.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False}
_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuCase:
    """One model, and the sizes of what is measured on it."""

    name: str
    model: str
    config: Mapping[str, Any]  # config.json
    sequences: int  # of one forward and backward pass
    length: int  # tokens of each; the second half is predicted
    micro_tokens: int  # of a micro-batch
    batches: Sequence[int]  # sequences decoded together
    prompt: int
    new_tokens: int
    groups: int  # prompts of a GRPO step
    samples: int = 8
    rounds: int = 3  # measured, after one that warms up

    def tokens(self, *shape: int) -> np.ndarray:
        """Random token ids [*shape] int32, the same for every side."""
        draw = np.random.default_rng(shape)
        return draw.integers(3, self.config["vocab_size"], shape, dtype=np.int32)

    def rows(self, batch: int) -> tuple[int, int]:
        """Prompts, and samples of each, of a batch that is decoded together."""
        samples = min(batch, self.samples)
        return batch // samples, samples


CASES = {
    case.name: case
    for case in (
        GpuCase(
            name="0.6b",
            model="Qwen3-0.6B",
            config={
                **_QWEN3,
                "vocab_size": 151936,
                "hidden_size": 1024,
                "intermediate_size": 3072,
                "num_hidden_layers": 28,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "rms_norm_eps": 1e-6,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
                "max_position_embeddings": 40960,
                "tie_word_embeddings": True,
            },
            sequences=32,
            length=1024,
            micro_tokens=8192,
            batches=(1, 8, 64, 256),
            prompt=256,
            new_tokens=64,
            groups=8,
        ),
        GpuCase(
            name="8b",
            model="Llama-3-8B",
            config={
                **_LLAMA,
                "vocab_size": 128256,
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-5,
                "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
                "max_position_embeddings": 8192,
                "tie_word_embeddings": False,
            },
            sequences=8,
            length=1024,
            micro_tokens=4096,
            batches=(1, 8, 64, 256),
            prompt=256,
            new_tokens=64,
            groups=8,
            rounds=2,
        ),
    )
}
TINY = GpuCase(
    name="tiny",
    model="a model of two layers",
    config={
        **_QWEN3,
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    },
    sequences=4,
    length=16,
    micro_tokens=32,
    batches=(1, 4),
    prompt=8,
    new_tokens=4,
    groups=2,
    samples=2,
    rounds=1,
)


def case_of(name: str) -> GpuCase:
    """A case, or the tiny one."""
    return TINY if name == TINY.name else CASES[name]


def device() -> torch.device:
    """CUDA's current device, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def weight(name: str, shape: Sequence[int]) -> Tensor:
    """A weight by the checkpoint's name, in bf16 on the device: 1 for norms, else normal."""
    if "norm" in name:
        return torch.ones(*shape, dtype=torch.bfloat16, device=device())
    generator = torch.Generator(device()).manual_seed(zlib.crc32(name.encode()))
    tensor = torch.empty(*shape, dtype=torch.bfloat16, device=device())
    return tensor.normal_(0, 0.02, generator=generator)
