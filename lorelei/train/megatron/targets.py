"""The linear layers of this rank's part of the model, by the checkpoint's names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lorelei.lora.targets import FUSED, HEAD
from lorelei.model.config import DecoderConfig
from lorelei.train.megatron.adapter import Style, TargetLinear
from lorelei.train.megatron.mesh import MegatronMesh


def find_targets(model: Any, config: DecoderConfig, mesh: MegatronMesh) -> list[TargetLinear]:
    """All of them, in order of execution."""
    found: list[TargetLinear] = []
    for layer in model.decoder.layers:
        prefix = f"model.layers.{layer.layer_number - 1}"
        found += _attention(f"{prefix}.self_attn", layer.self_attention, config, mesh)
        found += _mlps(f"{prefix}.mlp", layer.mlp, mesh)
    if mesh.last_stage:
        found.append(_head(model, config, mesh))
    return found


def head_rows(config: DecoderConfig, mesh: MegatronMesh) -> tuple[int, int]:
    """[first, stop): the tokens whose rows of the head are here, without padding."""
    size = -(-config.vocab // mesh.tensor.size)
    first = min(mesh.tensor.rank * size, config.vocab)
    return first, min(first + size, config.vocab)


def _attention(
    prefix: str, attention: Any, config: DecoderConfig, mesh: MegatronMesh
) -> Iterator[TargetLinear]:
    ranks = mesh.tensor.size
    queries, keys = (n * config.head_dim // ranks for n in (config.heads, config.kv_heads))
    widths = (queries, keys, keys)
    groups = config.kv_heads // ranks  # Megatron has the queries of a key head beside it
    yield _target(
        prefix, "linear_qkv", attention.linear_qkv, "column", widths, config.hidden, mesh, groups
    )
    yield _target(
        prefix, "linear_proj", attention.linear_proj, "row", (config.hidden,), queries, mesh
    )


def _mlps(prefix: str, mlp: Any, mesh: MegatronMesh) -> Iterator[TargetLinear]:
    experts = getattr(mlp, "experts", None)
    if experts is None:
        yield from _mlp(prefix, mlp, mesh, expert=False)
        return
    local = experts.local_experts
    for i, one in enumerate(local):
        number = mesh.expert.rank * len(local) + i
        yield from _mlp(f"{prefix}.experts.{number}", one, mesh, expert=True)


def _mlp(prefix: str, mlp: Any, mesh: MegatronMesh, expert: bool) -> Iterator[TargetLinear]:
    both, hidden = mlp.linear_fc1.weight.shape
    wide = both // 2
    yield _target(
        prefix, "linear_fc1", mlp.linear_fc1, "column", (wide, wide), hidden, mesh, 1, expert
    )
    yield _target(prefix, "linear_fc2", mlp.linear_fc2, "row", (hidden,), wide, mesh, 1, expert)


def _target(
    prefix: str,
    fused: str,
    module: Any,
    style: Style,
    widths: tuple[int, ...],
    inputs: int,
    mesh: MegatronMesh,
    groups: int = 1,
    expert: bool = False,
) -> TargetLinear:
    axis = mesh.splitting(expert)
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
        partial=axis.size > 1 and (expert or mesh.sequence_parallel),
    )


def _head(model: Any, config: DecoderConfig, mesh: MegatronMesh) -> TargetLinear:
    first, stop = head_rows(config, mesh)
    return TargetLinear(
        module=model.output_layer,
        style="column",
        parts=(HEAD,),
        widths=(stop - first,),
        inputs=config.hidden,
        groups=1,
        expert=False,
        shards=mesh.tensor.size,
        shard=mesh.tensor.rank,
        partial=False,  # it reads the whole sequence
    )
