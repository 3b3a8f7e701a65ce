"""What the decoder needs to know of a checkpoint's config.json, and a run of any model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}

ROPE_TYPES = {  # and the fields that each needs
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}


BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # of a number
CHUNK_ELEMENTS = 1 << 23  # logits held at once on a CPU: 32 MiB in fp32
GPU_LOGITS = 16  # times as many on a GPU, which needs long products


class UnsupportedModel(ValueError):
    """The checkpoint is of an architecture or variant that an engine does not build."""


class ForeignModel(UnsupportedModel):
    """An architecture that our decoder does not build; transformers and the servers may."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"model: {what} is not supported by train.kind archon and megatron, nor by "
            f"rollout.kind embedded, which build {', '.join(FAMILIES)}; use train.kind: fsdp with "
            "rollout.kind: vllm or sglang"
        )


def flash_heads(head_dim: int) -> bool:
    """Whether CUDA's fused attention takes heads of this size, in half precision."""
    return head_dim % 8 == 0 and head_dim <= 256


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    """Mixture-of-experts layers."""

    experts: int
    experts_per_token: int
    intermediate: int
    normalise_topk: bool
    sparse_step: int
    dense_layers: frozenset[int]

    def is_sparse(self, layer: int) -> bool:
        return layer not in self.dense_layers and (layer + 1) % self.sparse_step == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """What a run must know of its model, whoever builds it."""

    architecture: str
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied_embeddings: bool
    qk_norm: bool
    max_positions: int
    moe: MoeConfig | None
    window: int | None = None  # tokens that some layers attend to; None: full attention
    softcap: float | None = None  # of the attention's scores

    def context(self, most: int | None) -> int:
        """Most tokens of a sequence where `most` are asked for; None: all positions."""
        return min(most or self.max_positions, self.max_positions)

    def cache_bytes(self, dtype: str, processes: int = 1) -> int:
        """Keys and values of one token, on each of `processes` that share the heads."""
        heads = -(-self.kv_heads // processes)
        return self.layers * 2 * heads * self.head_dim * BYTES[dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What is known of a base model without its weights.

    Enough to plan a run, to name what it adapts and to start its servers.
    """

    sizes: ModelSizes
    # {name: (out, in)} of every linear layer that can get an adapter, in order of execution
    linears: Mapping[str, tuple[int, int]]
    parameters: Mapping[str, int]  # by part; a tied lm_head counts none


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig(ModelSizes):
    """A decoder of the Llama, Qwen2, Qwen3 or Qwen3-MoE family."""

    norm_eps: float
    rope: Mapping[str, Any]  # rope_type, rope_theta and the parameters of its type

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        """From a parsed config.json. Raises UnsupportedModel by name: ForeignModel, or another."""
        architecture = _architecture(hf)
        _refuse_variants(hf, architecture)
        family = FAMILIES[architecture]
        try:
            heads = hf["num_attention_heads"]
            default_head_dim = 128 if family == "qwen3" else hf["hidden_size"] // heads
            return cls(
                architecture=architecture,
                vocab=hf["vocab_size"],
                hidden=hf["hidden_size"],
                intermediate=hf["intermediate_size"],
                layers=hf["num_hidden_layers"],
                heads=heads,
                kv_heads=hf.get("num_key_value_heads") or heads,
                head_dim=hf.get("head_dim") or default_head_dim,
                norm_eps=hf.get("rms_norm_eps", 1e-6),
                tied_embeddings=hf.get("tie_word_embeddings", False),
                qk_norm=family.startswith("qwen3"),
                max_positions=hf.get("max_position_embeddings", 2048),
                rope=_rope(hf),
                moe=_moe(hf) if family == "qwen3_moe" else None,
            )
        except KeyError as missing:
            raise UnsupportedModel(
                f"model: config.json has no {missing}; is it complete?"
            ) from None


def _architecture(hf: Mapping[str, Any]) -> str:
    names: list[str] = hf.get("architectures") or []
    if not names:  # GGUF and some tests carry only the model type
        by_type = {family: name for name, family in FAMILIES.items()}
        names = [by_type.get(str(hf.get("model_type")), str(hf.get("model_type")))]
    if names[0] not in FAMILIES:
        raise ForeignModel(f"architecture {names[0]!r}")
    return names[0]


def _refuse_variants(hf: Mapping[str, Any], architecture: str) -> None:
    if hf.get("hidden_act", "silu") != "silu":
        raise ForeignModel(f"hidden_act {hf['hidden_act']!r} of {architecture}")
    if hf.get("use_sliding_window") or "sliding_attention" in (hf.get("layer_types") or []):
        raise ForeignModel(f"{architecture} with use_sliding_window")
    if hf.get("quantization_config"):
        method = hf["quantization_config"].get("quant_method", "unknown")
        raise UnsupportedModel(
            f"model: weights quantised with {method} are not supported by train engines; use the "
            "unquantised checkpoint"
        )


def _rope(hf: Mapping[str, Any]) -> dict[str, Any]:
    """transformers 5 keeps everything in rope_parameters; earlier files in several fields."""
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", hf.get("rope_theta", 10000.0))
    rope.setdefault("original_max_position_embeddings", hf.get("max_position_embeddings"))
    kind = rope["rope_type"]
    if kind not in ROPE_TYPES:
        raise ForeignModel(f"rope_type {kind!r}")
    if missing := [name for name in ROPE_TYPES[kind] if name not in rope]:
        raise UnsupportedModel(f"model: rope_type {kind!r} needs {missing[0]!r} in config.json")
    partial = rope.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise ForeignModel(f"partial_rotary_factor {partial}")
    return rope


def _moe(hf: Mapping[str, Any]) -> MoeConfig:
    return MoeConfig(
        # transformers 5 writes num_local_experts
        experts=hf["num_experts"] if "num_experts" in hf else hf["num_local_experts"],
        experts_per_token=hf["num_experts_per_tok"],
        intermediate=hf["moe_intermediate_size"],
        normalise_topk=hf.get("norm_topk_prob", False),
        sparse_step=hf.get("decoder_sparse_step", 1),
        dense_layers=frozenset(hf.get("mlp_only_layers") or []),
    )
