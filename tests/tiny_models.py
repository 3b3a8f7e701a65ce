"""Random checkpoints of every supported family, small enough to make in a moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from lorelei.model.config import DecoderConfig
from lorelei.model.load import read_config

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe")
# what our own decoder does not build, each with something none of those has: windows; softcaps,
# norms behind blocks; biases everywhere, partly rotated heads, attention and MLP side by side
FOREIGN = ("mistral", "gemma2", "phi")

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = ["What is the sum of 12 and 30? The answer is 42.", "user assistant system question"]

_SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # heads * head_dim != hidden, as in Qwen3
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_MOE_SIZES: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
}


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """The transformers configuration of a tiny model. Raises ValueError for other families."""
    match family:
        case "llama":
            return LlamaConfig(**{**_SIZES, "attention_bias": False, **overrides})
        case "qwen2":  # Qwen2 has no head_dim of its own
            sizes = {**_SIZES, "hidden_size": 128, "head_dim": 32}
            return Qwen2Config(**{**sizes, **overrides})
        case "qwen3":
            return Qwen3Config(**{**_SIZES, **overrides})
        case "qwen3_moe":
            return Qwen3MoeConfig(**{**_SIZES, **_MOE_SIZES, **overrides})
        case "mistral":
            return MistralConfig(**{**_SIZES, "sliding_window": 6, **overrides})
        case "gemma2":
            caps = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0}
            return Gemma2Config(**{**_SIZES, **caps, "sliding_window": 6, **overrides})
        case "phi":  # heads * head_dim is hidden there
            return PhiConfig(
                **{**_SIZES, "hidden_size": 128, "partial_rotary_factor": 0.5, **overrides}
            )
        case _:
            raise ValueError(f"family {family!r} is not one of {', '.join((*FAMILIES, *FOREIGN))}")


def make_tiny(family: str, folder: Path, **overrides: Any) -> Path:
    """Save a random fp32 checkpoint into `folder` (overrides: fields of config.json; seed)."""
    seed = overrides.pop("seed", 0)
    model = AutoModelForCausalLM.from_config(
        tiny_config(family, **overrides), dtype=torch.float32, attn_implementation="eager"
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():  # shared parameters come once
        _randomise(name, parameter.data, generator)
    model.tie_weights()
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 300 ids with a ChatML template; it encodes any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )


def sizes_of(folder: Path) -> DecoderConfig:
    """Of a model of one of the FAMILIES."""
    return DecoderConfig.from_hf(read_config(folder))


def _randomise(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    """Norms around 1, biases around 0, matrices that keep the scale of their input."""
    if "norm" in name:
        tensor.uniform_(0.5, 1.5, generator=generator)
    elif name.endswith("bias"):
        tensor.normal_(0, 0.3, generator=generator)
    else:  # logits get a standard deviation of about 2: far from flat, and far from one-hot
        gain = 2 if "lm_head" in name or "embed" in name else 1
        tensor.normal_(0, gain * tensor.shape[-1] ** -0.5, generator=generator)
