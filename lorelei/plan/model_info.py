"""The sizes of a run's base model. No torch for the families that our own decoder builds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorelei.config.run import RunConfig
from lorelei.lora.targets import HEAD, Shape, module_shapes
from lorelei.model.config import DecoderConfig, ForeignModel, ModelInfo
from lorelei.train.kinds import TRAIN


def model_info(config: RunConfig, folder: Path, hf_config: Mapping[str, Any]) -> ModelInfo:
    """Of the model in `folder`, whose parsed config.json is hf_config.

    A model that our decoder does not build is left to the train engine, where servers sample.
    Raises UnsupportedModel with one clear line.
    """
    try:
        return decoder_info(hf_config)
    except ForeignModel:
        foreign_info = TRAIN[config.train.kind].foreign_info
        if foreign_info is None or config.rollout.kind == "embedded":
            raise
    return foreign_info(config.train, folder)


def decoder_info(hf_config: Mapping[str, Any]) -> ModelInfo:
    """Of a model that our decoder builds. Raises UnsupportedModel for others."""
    model, shapes = DecoderConfig.from_hf(hf_config), module_shapes(hf_config)
    counts = count_parameters(model, shapes, hf_config)
    return ModelInfo(sizes=model, linears=shapes, parameters=counts)


def count_parameters(
    model: DecoderConfig, shapes: Mapping[str, Shape], hf_config: Mapping[str, Any]
) -> dict[str, int]:
    """Parameters of the base model by part; a tied lm_head has none of its own."""
    attention_bias, mlp_bias = _biases(model, hf_config)
    counts = {"embeddings": model.vocab * model.hidden, "attention": 0, "mlp": 0}
    for name, (out, wide) in shapes.items():
        if name == HEAD:
            continue
        in_attention = ".self_attn." in name
        biased = name.endswith(attention_bias) if in_attention else mlp_bias
        counts["attention" if in_attention else "mlp"] += out * wide + (out if biased else 0)
    if model.moe is not None:
        sparse = sum(model.moe.is_sparse(layer) for layer in range(model.layers))
        counts["routers"] = sparse * model.moe.experts * model.hidden
    norms = 2 * model.hidden + (2 * model.head_dim if model.qk_norm else 0)
    counts["norms"] = model.layers * norms + model.hidden
    counts["lm_head"] = 0 if model.tied_embeddings else model.vocab * model.hidden
    return counts


def _biases(model: DecoderConfig, hf_config: Mapping[str, Any]) -> tuple[tuple[str, ...], bool]:
    """(which projections of the attention have a bias, whether the MLP's do)."""
    if model.architecture == "Qwen2ForCausalLM":  # fixed, not in its config.json
        return ("q_proj", "k_proj", "v_proj"), False
    biased = ("q_proj", "k_proj", "v_proj", "o_proj") if hf_config.get("attention_bias") else ()
    return biased, bool(hf_config.get("mlp_bias"))
