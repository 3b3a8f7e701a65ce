"""What one process of a rollout server holds, and how much that leaves for keys and values.

Shapes: D hidden, F intermediate, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lorelei.config.rollout import AnyServer
from lorelei.inference.kind import ServerKind
from lorelei.inference.kinds import SERVERS
from lorelei.inference.server.options import largest_rank, versions_in_use
from lorelei.lora.targets import HEAD, Shape
from lorelei.model.config import BYTES
from lorelei.plan.hardware import Hardware
from lorelei.plan.memory import FP32, GIB, Footprint, MemoryItem, intermediate

PREFILL = 8192  # tokens that servers read at once, at most


def server_parts(
    run: Footprint,
    rollout: AnyServer,
    shapes: Mapping[str, Shape],
    modules: set[str],
    hardware: Hardware,
) -> tuple[tuple[MemoryItem, ...], str]:
    """(parts of one process, what is wrong with them). modules: that any adapter has."""
    kind = SERVERS[rollout.kind]
    fixed = tuple(_fixed(run, kind, rollout, shapes, modules))
    cache, problem = _cache(run, kind, rollout, sum(p.bytes for p in fixed), hardware)
    return (*fixed, cache), problem


def _fixed(
    run: Footprint,
    kind: ServerKind,
    rollout: AnyServer,
    shapes: Mapping[str, Shape],
    modules: set[str],
) -> Iterator[MemoryItem]:
    each, tensor, model = BYTES[run.config.dtype], rollout.tensor_parallel_size, run.model
    split = f" / {tensor} tensor parallel" if tensor > 1 else ""
    yield MemoryItem(
        name="base model",
        bytes=run.base * each // tensor,
        how=f"{run.base:,} parameters x {each} bytes{split}",
    )
    slots = kind.slots(versions_in_use(run.config), largest_rank(run.config, rollout))
    adapted = set(shapes) - {HEAD} if kind.every_layer else modules
    of_one = sum(slots.rank * sum(shapes[name]) for name in adapted)
    yield MemoryItem(
        name="adapter slots",
        bytes=slots.versions * of_one * each,
        how=f"{slots.versions} versions x {of_one:,} parameters of rank {slots.rank} x "
        f"{each} bytes",
    )
    numbers = 2 * model.hidden + 3 * intermediate(model) // tensor
    read, logits = PREFILL * numbers * each, 2 * rollout.max_running * model.vocab * FP32
    how = f"2 x {rollout.max_running} rows of {model.vocab:,} logits x {FP32} bytes"
    if read > logits:
        how = f"{PREFILL:,} tokens read at once x {numbers:,} numbers x {each} bytes"
    yield MemoryItem(name="working", bytes=max(read, logits), how=how)


def _cache(
    run: Footprint, kind: ServerKind, rollout: AnyServer, fixed: int, hardware: Hardware
) -> tuple[MemoryItem, str]:
    """Keys and values, and what is wrong when not even one sequence has room."""
    token = run.model.cache_bytes(run.config.dtype, rollout.tensor_parallel_size)
    context = run.model.context(rollout.max_context)
    wanted = rollout.max_running * context * token
    most = f"{rollout.max_running} sequences x {context:,} tokens x {token:,} bytes"
    if hardware.on_cpu:
        room = kind.cpu_cache(run.model, run.config.dtype, rollout)
        return MemoryItem(name="KV cache", bytes=room, how="rollout.cpu_cache_gib, of " + most), ""
    if hardware.memory is None:
        how = f"{most}; with --memory: what is left of a device"
        return MemoryItem(name="KV cache", bytes=wanted, how=how), ""
    option = kind.memory_option
    share = float(rollout.extra_args.get(option, kind.memory_share))
    room = int(share * hardware.memory) - fixed
    fits = max(room, 0) // token
    how = (
        f"{option} {share:g} x {hardware.memory / GIB:.1f} GiB less the above: {fits:,} tokens of "
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
