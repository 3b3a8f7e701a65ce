"""The linear layers of this rank's part of the model, by the checkpoint's names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lorelei.lora.targets import FUSED, HEAD
from lorelei.model.config import DecoderConfig
from lorelei.train.megatron.adapter import Style, TargetLinear
from lorelei.train.megatron.layout import Layout


def find_sites(model: Any, config: DecoderConfig, layout: Layout) -> list[TargetLinear]:
    """All of them, in order of execution."""
    found: list[TargetLinear] = []
    for layer in model.decoder.layers:
        prefix = f"model.layers.{layer.layer_number - 1}"
        found += _attention(f"{prefix}.self_attn", layer.self_attention, config, layout)
        found += _mlps(f"{prefix}.mlp", layer.mlp, layout)
    if layout.last_stage:
        found.append(_head(model, config, layout))
    return found


def head_rows(config: DecoderConfig, layout: Layout) -> tuple[int, int]:
    """[first, stop): the tokens whose rows of the head are here, without padding."""
    size = -(-config.vocab // layout.tensor.size)
    first = min(layout.tensor.rank * size, config.vocab)
    return first, min(first + size, config.vocab)


def _attention(
    prefix: str, attention: Any, config: DecoderConfig, layout: Layout
) -> Iterator[TargetLinear]:
    ranks = layout.tensor.size
    queries, keys = (n * config.head_dim // ranks for n in (config.heads, config.kv_heads))
    widths = (queries, keys, keys)
    groups = config.kv_heads // ranks  # Megatron has the queries of a key head beside it
    yield _site(
        prefix, "linear_qkv", attention.linear_qkv, "column", widths, config.hidden, layout, groups
    )
    yield _site(
        prefix, "linear_proj", attention.linear_proj, "row", (config.hidden,), queries, layout
    )


def _mlps(prefix: str, mlp: Any, layout: Layout) -> Iterator[TargetLinear]:
    experts = getattr(mlp, "experts", None)
    if experts is None:
        yield from _mlp(prefix, mlp, layout, expert=False)
        return
    local = experts.local_experts
    for i, one in enumerate(local):
        number = layout.expert.rank * len(local) + i
        yield from _mlp(f"{prefix}.experts.{number}", one, layout, expert=True)


def _mlp(prefix: str, mlp: Any, layout: Layout, expert: bool) -> Iterator[TargetLinear]:
    both, hidden = mlp.linear_fc1.weight.shape
    wide = both // 2
    yield _site(
        prefix, "linear_fc1", mlp.linear_fc1, "column", (wide, wide), hidden, layout, 1, expert
    )
    yield _site(prefix, "linear_fc2", mlp.linear_fc2, "row", (hidden,), wide, layout, 1, expert)


def _site(
    prefix: str,
    fused: str,
    module: Any,
    style: Style,
    widths: tuple[int, ...],
    inputs: int,
    layout: Layout,
    groups: int = 1,
    expert: bool = False,
) -> TargetLinear:
    axis = layout.splitting(expert)
    return TargetLinear(
        module=module,
        style=style,
        parts=tuple(f"{prefix}.{leaf}" for leaf in FUSED[fused]),
        widths=widths,
        inputs=inputs,
        groups=groups,
        expert=expert,
        shards=axis.size,
        shard=axis.rank,
        partial=axis.size > 1 and (expert or layout.sequence_parallel),
    )


def _head(model: Any, config: DecoderConfig, layout: Layout) -> TargetLinear:
    first, stop = head_rows(config, layout)
    return TargetLinear(
        module=model.output_layer,
        style="column",
        parts=(HEAD,),
        widths=(stop - first,),
        inputs=config.hidden,
        groups=1,
        expert=False,
        shards=layout.tensor.size,
        shard=layout.tensor.rank,
        partial=False,  # it reads the whole sequence
    )
