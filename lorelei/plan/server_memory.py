"""What one process of a rollout server holds, and how much that leaves for keys and values.

Shapes: D hidden, F intermediate, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lorelei.config.rollout import ServerRollout, SglangRollout
from lorelei.config.vllm_options import rank_at_least
from lorelei.lora.targets import HEAD, Shape
from lorelei.plan.hardware import Hardware
from lorelei.plan.memory import BYTES, Footprint, intermediate
from lorelei.plan.memory_item import MemoryItem

_FP32 = 4
_GIB = 1 << 30
PREFILL = 8192  # tokens that servers read at once, at most
SHARE = {"vllm": 0.9, "sglang": 0.88}  # of a device, where extra_args says nothing
_OPTION = {"vllm": "gpu-memory-utilization", "sglang": "mem-fraction-static"}


def server_parts(
    run: Footprint,
    rollout: ServerRollout,
    shapes: Mapping[str, Shape],
    modules: set[str],
    hardware: Hardware,
) -> tuple[tuple[MemoryItem, ...], str]:
    """(parts of one process, what is wrong with them). modules: that any adapter has."""
    fixed = tuple(_fixed(run, rollout, shapes, modules))
    cache, problem = _cache(run, rollout, sum(p.bytes for p in fixed), hardware)
    return (*fixed, cache), problem


def slots(run: Footprint, rollout: ServerRollout) -> tuple[int, int]:
    """(adapter versions that a server has room for, their rank)."""
    experiments = run.config.experiments()
    versions = sum(e.rollout.max_head_offpolicyness + 2 for e in experiments)
    rank = max(rollout.reserve_rank, *(e.lora.lora_rank for e in experiments))
    if isinstance(rollout, SglangRollout):
        return versions + 1, rank  # the base model takes a place
    return versions, rank_at_least(rank)


def cache_token_bytes(run: Footprint, tensor: int) -> int:
    """Keys and values of one token, on each of `tensor` processes."""
    model = run.model
    heads = -(-model.kv_heads // tensor)
    return model.layers * 2 * heads * model.head_dim * BYTES[run.config.dtype]


def _fixed(
    run: Footprint, rollout: ServerRollout, shapes: Mapping[str, Shape], modules: set[str]
) -> Iterator[MemoryItem]:
    each, tensor, model = BYTES[run.config.dtype], rollout.tensor_parallel_size, run.model
    split = f" / {tensor} tensor parallel" if tensor > 1 else ""
    yield MemoryItem(
        name="base model",
        bytes=run.base * each // tensor,
        how=f"{run.base:,} parameters x {each} bytes{split}",
    )
    versions, rank = slots(run, rollout)
    # vLLM makes room on every linear layer, whatever is adapted
    adapted = modules if isinstance(rollout, SglangRollout) else set(shapes) - {HEAD}
    of_one = sum(rank * sum(shapes[name]) for name in adapted)
    yield MemoryItem(
        name="adapter slots",
        bytes=versions * of_one * each,
        how=f"{versions} versions x {of_one:,} parameters of rank {rank} x {each} bytes",
    )
    numbers = 2 * model.hidden + 3 * intermediate(model) // tensor
    read, logits = PREFILL * numbers * each, 2 * rollout.max_running * model.vocab * _FP32
    how = f"2 x {rollout.max_running} rows of {model.vocab:,} logits x {_FP32} bytes"
    if read > logits:
        how = f"{PREFILL:,} tokens read at once x {numbers:,} numbers x {each} bytes"
    yield MemoryItem(name="working", bytes=max(read, logits), how=how)


def _cache(
    run: Footprint, rollout: ServerRollout, fixed: int, hardware: Hardware
) -> tuple[MemoryItem, str]:
    """Keys and values, and what is wrong when not even one sequence has room."""
    token = cache_token_bytes(run, rollout.tensor_parallel_size)
    context = min(rollout.max_context or run.model.max_positions, run.model.max_positions)
    wanted = rollout.max_running * context * token
    most = f"{rollout.max_running} sequences x {context:,} tokens x {token:,} bytes"
    if hardware.on_cpu:
        room = getattr(rollout, "cpu_cache_gib", 2) * _GIB
        if isinstance(rollout, SglangRollout):
            room = max(min(wanted, room), context * token)
        return MemoryItem(name="KV cache", bytes=room, how="rollout.cpu_cache_gib, of " + most), ""
    if hardware.memory is None:
        how = f"{most}; with --memory: what is left of a device"
        return MemoryItem(name="KV cache", bytes=wanted, how=how), ""
    option = _OPTION[rollout.kind]
    share = float(rollout.extra_args.get(option, SHARE[rollout.kind]))
    room = int(share * hardware.memory) - fixed
    fits = max(room, 0) // token
    how = (
        f"{option} {share:g} x {hardware.memory / _GIB:.1f} GiB less the above: {fits:,} tokens of "
        f"{token:,} bytes, or {fits // context} sequences of {context:,}; {rollout.max_running} "
        "run at once at most"
    )
    problem = ""
    if fits < context:
        problem = (
            f"rollout: a {rollout.kind} process has no room for the keys and values of one "
            f"sequence of {context:,} tokens; raise rollout.tensor_parallel_size, or lower "
            "rollout.max_context"
        )
    return MemoryItem(name="KV cache", bytes=max(room, 0), how=how), problem
