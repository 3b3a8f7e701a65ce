"""The sizes of a model that transformers builds, from its modules on the meta device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lorelei.lora.targets import HEAD
from lorelei.model.config import ModelInfo, ModelSizes, MoeConfig
from lorelei.parallel.mesh import ALONE, Axis
from lorelei.train.fsdp.skeleton import Skeleton, build_skeleton

_PARTS = ("embeddings", "attention", "mlp", "norms", "lm_head")
_DEFAULT_POSITIONS = 2048  # of configurations that name none, as for our own families


def hosted_info(folder: Path, tensor_parallel: int = 1) -> ModelInfo:
    """Of the checkpoint in `folder`, no weight of which is read.

    Raises UnsupportedModel for what the engine would refuse, over this many tensor-parallel
    processes too.
    """
    if tensor_parallel > 1:  # raises what the engine would
        build_skeleton(folder, torch.float32, Axis(rank=0, size=tensor_parallel, group=None))
    skeleton = build_skeleton(folder, torch.float32, ALONE)
    layers = [module.layer for module in skeleton.hosted]
    linears = {layer.parts[0].name: layer.weight.shape for layer in layers}
    return ModelInfo(
        sizes=_sizes(skeleton, linears), linears=linears, parameters=_parameters(skeleton)
    )


def _sizes(skeleton: Skeleton, linears: Mapping[str, tuple[int, int]]) -> ModelSizes:
    lm, config = skeleton.lm, skeleton.lm.config
    heads, hidden = config.num_attention_heads, config.hidden_size
    return ModelSizes(
        architecture=(config.architectures or [type(lm).__name__])[0],
        vocab=config.vocab_size,
        hidden=hidden,
        intermediate=_width(config, linears),
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
        tied_embeddings=skeleton.head.weight is lm.get_input_embeddings().weight,
        qk_norm=any(name.endswith("q_norm.weight") for name, _ in lm.named_parameters()),
        max_positions=getattr(config, "max_position_embeddings", None) or _DEFAULT_POSITIONS,
        moe=_experts(config, linears),
        window=_window(config),
        softcap=getattr(config, "attn_logit_softcapping", None),
    )


def _width(config: Any, linears: Mapping[str, tuple[int, int]]) -> int:
    """Features of an MLP; of the widest layer where the configuration has another name for them."""
    widest = max(out for name, (out, _) in linears.items() if name != HEAD)
    return getattr(config, "intermediate_size", None) or widest


def _experts(config: Any, linears: Mapping[str, tuple[int, int]]) -> MoeConfig | None:
    """Those that can be adapted; else those that config.json speaks of."""
    count = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0
    width = getattr(config, "moe_intermediate_size", None) or _width(config, linears)
    of_layers: dict[int, set[str]] = {}
    for name, (_, wide) in linears.items():
        before, found, after = name.partition(".experts.")
        if found:
            number = next(int(part) for part in before.split(".") if part.isdigit())
            of_layers.setdefault(number, set()).add(after.partition(".")[0])
            width = wide  # the last one is down_proj
    if not of_layers and not count:
        return None
    sparse = of_layers or range(config.num_hidden_layers)
    return MoeConfig(
        experts=max(map(len, of_layers.values()), default=count),
        experts_per_token=getattr(config, "num_experts_per_tok", None) or 1,
        intermediate=width,
        normalise_topk=bool(getattr(config, "norm_topk_prob", True)),
        sparse_step=1,
        dense_layers=frozenset(set(range(config.num_hidden_layers)).difference(sparse)),
    )


def _window(config: Any) -> int | None:
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or "sliding_attention" in kinds
    return getattr(config, "sliding_window", None) if slides else None


def _parameters(skeleton: Skeleton) -> dict[str, int]:
    """By part; a parameter with several names once."""
    lm = skeleton.lm
    embedding = {id(p) for p in lm.get_input_embeddings().parameters()}
    head = {id(p) for p in skeleton.head.parameters()} - embedding
    blocks = {id(p) for block in skeleton.blocks for p in block.parameters()}
    counts: Counter[str] = Counter(dict.fromkeys(_PARTS, 0))
    for name, parameter in lm.named_parameters():
        if id(parameter) in head:
            part = "lm_head"
        elif "norm" in name:
            part = "norms"
        elif id(parameter) not in blocks:
            part = "embeddings"  # of positions too
        else:
            part = _part_of_block(name)
        counts[part] += parameter.numel()
    return dict(counts)


def _part_of_block(name: str) -> str:
    words = name.split(".")
    if {"gate", "router"} & set(words):
        return "routers"
    return "attention" if any("attn" in w or w == "attention" for w in words) else "mlp"
