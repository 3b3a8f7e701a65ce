"""The linear layers of this rank's part of the model, by the checkpoint's names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
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
        first, stop = head_rows(config, mesh)
        found.append(
            _target((HEAD,), model.output_layer, "column", (stop - first,), config.hidden, mesh)
        )
    return found


def head_rows(config: DecoderConfig, mesh: MegatronMesh) -> tuple[int, int]:
    """[first, stop): the tokens whose rows of the head are here, without padding."""
    size = -(-config.vocab // mesh.tensor.size)
    first = min(mesh.tensor.rank * size, config.vocab)
    return first, min(first + size, config.vocab)


def _attention(
    prefix: str, attention: Any, config: DecoderConfig, mesh: MegatronMesh
) -> Iterator[TargetLinear]:
    ranks, hidden = mesh.tensor.size, config.hidden
    queries, keys = (n * config.head_dim // ranks for n in (config.heads, config.kv_heads))
    qkv, proj = (_fused(prefix, name) for name in ("linear_qkv", "linear_proj"))
    made = _target(qkv, attention.linear_qkv, "column", (queries, keys, keys), hidden, mesh)
    # Megatron has the queries of a key head beside it
    yield replace(made, groups=config.kv_heads // ranks)
    yield _target(proj, attention.linear_proj, "row", (hidden,), queries, mesh)


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
    up, down = (_fused(prefix, name) for name in ("linear_fc1", "linear_fc2"))
    yield _target(up, mlp.linear_fc1, "column", (wide, wide), hidden, mesh, expert)
    yield _target(down, mlp.linear_fc2, "row", (hidden,), wide, mesh, expert)


def _fused(prefix: str, name: str) -> tuple[str, ...]:
    return tuple(f"{prefix}.{leaf}" for leaf in FUSED[name])


def _target(
    parts: tuple[str, ...],
    module: Any,
    style: Style,
    widths: tuple[int, ...],
    inputs: int,
    mesh: MegatronMesh,
    expert: bool = False,
) -> TargetLinear:
    axis = mesh.splitting(expert)
    sums = axis.size > 1 and (expert or mesh.sequence_parallel)
    return TargetLinear(
        module=module,
        style=style,
        parts=parts,
        widths=widths,
        inputs=inputs,
        groups=1,
        expert=expert,
        shards=axis.size,
        shard=axis.rank,
        partial=sums and parts != (HEAD,),  # which reads the whole sequence
    )
