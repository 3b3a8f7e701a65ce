"""Resident memory of each process of train engine fsdp, by how many share the base model.

usage: python -m acceptance rank_memory [CASE ...]
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from acceptance.record import Line
from acceptance.table import table
from benchmarks.cases import MODEL
from lorelei.model.locate import resolve_model
from lorelei.train.fsdp.kind import FsdpSpec
from lorelei.train.remote.engine import RemoteEngine
from lorelei.types import AdamHyper, AdapterSpec
from tests.contract.train_engines import GRPO
from tests.episodes import random_group, weighted_batch

RANK, GROUPS, SAMPLES, PROMPT, ANSWER = 16, 2, 4, 64, 64
STEPS = 3
MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """How many processes hold the base model together."""

    workers: int
    recompute: bool


CASES = {
    "dp1": Case(workers=1, recompute=False),
    "dp2": Case(workers=2, recompute=False),
    "dp4": Case(workers=4, recompute=False),
    "dp1-checkpointing": Case(workers=1, recompute=True),
    "dp2-checkpointing": Case(workers=2, recompute=True),
}


async def measure(case: Case) -> Line:
    """One row."""
    spec = FsdpSpec(
        model=str(resolve_model(MODEL)),
        dtype="float32",
        max_tokens_per_mb=PROMPT + SAMPLES * ANSWER,  # a group is a micro-batch
        recompute=case.recompute,
    )
    engine = RemoteEngine(spec, case.workers)
    try:
        engine.add_adapter("a", AdapterSpec(rank=RANK, alpha=2 * RANK))
        loaded = [_resident(pid, "VmRSS") for pid in engine.pids]
        rng = np.random.default_rng(0)
        groups = [random_group(rng, PROMPT, [ANSWER] * SAMPLES) for _ in range(GROUPS)]
        batch = weighted_batch("a", groups)
        seconds: list[float] = []
        for _ in range(STEPS):
            start = time.perf_counter()
            engine.forward_backward(batch, {"a": GRPO})
            engine.optim_step({"a": AdamHyper(lr=1e-4)})
            seconds.append(time.perf_counter() - start)
        peaks = [_resident(pid, "VmHWM") for pid in engine.pids]
    finally:
        engine.close()
    return {
        "loaded_mib": round(max(loaded) / MIB),
        "peak_mib": round(max(peaks) / MIB),
        "step_s": round(min(seconds), 2),
        "problems": [],
    }


def _resident(pid: int, field: str) -> int:
    """Bytes, from Linux."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) << 10


def section(found: Mapping[str, Line]) -> str:
    """Its part of docs/acceptance.md."""
    rows = [
        (
            CASES[name].workers,
            "yes" if CASES[name].recompute else "no",
            row["loaded_mib"],
            row["peak_mib"],
            f"{row['step_s']:.2f}",
        )
        for name, row in found.items()
    ]
    columns = ("processes", "recomputed", "loaded, MiB", "peak, MiB", "step, s")
    return f"""## Memory of each process of train engine fsdp

SmolLM2-135M in fp32 (513 MiB of weights), rank {RANK} on all linear layers, {GROUPS} groups of
{SAMPLES} samples of {PROMPT} + {ANSWER} tokens a step, a group in a micro-batch; the largest
process. *Loaded* is resident memory before the first step; Python, torch and transformers are in
it. All processes run on the machine's cores, so that a step's time says what sharding costs and
not what it gains. With one process nothing is sharded.

`make acceptance ARGS=rank_memory`

{table(columns, rows)}
"""
