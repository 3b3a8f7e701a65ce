"""Short asynchronous runs of a train engine with every rollout engine and publisher.

usage: python -m acceptance pairs [CASE ...]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from acceptance.record import Line
from acceptance.stage import PUBLISHERS
from acceptance.table import table
from benchmarks.cases import MODEL
from lorelei.config.paths import resolve_model
from lorelei.lora.state import AdapterState
from lorelei.model.tokenizer import load_tokenizer
from lorelei.rollout.server.payload import pack
from lorelei.store.run import RunStore
from tests.tiny_models import make_tiny
from tests.tiny_runs import REWARD, records, tiny_run

STEPS, STALENESS = 5, 2
FUSED = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
ATTENTION = ["linear_qkv", "linear_proj"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """A train engine on a tiny model."""

    family: str
    train: Mapping[str, Any]
    targets: tuple[list[str], list[str]]  # with the embedded engine, with servers on a CPU


SIDES = {
    "fsdp": Side(
        family="llama",
        train={"kind": "fsdp", "data_parallel": 2, "gradient_checkpointing": True},
        targets=(["all-linear"], ["all-linear"]),
    ),
    "megatron": Side(
        family="llama",
        train={"kind": "megatron", "tensor_parallel": 2},
        targets=(FUSED, FUSED),
    ),
    # servers on a CPU cannot adapt experts
    "megatron_experts": Side(
        family="qwen3_moe",
        train={"kind": "megatron", "data_parallel": 2, "expert_parallel": 2},
        targets=(FUSED, ATTENTION),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A train engine, a rollout engine and the publisher between them."""

    side: str
    engine: str
    publisher: str


CASES = {
    f"{side}-{engine}-{publisher}": Case(side=side, engine=engine, publisher=publisher)
    for side in SIDES
    for engine, publishers in PUBLISHERS.items()
    for publisher in publishers
}


async def measure(case: Case) -> Line:
    """One row."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        targets = _write(case, root)
        start = time.monotonic()
        command = [sys.executable, "-m", "lorelei", "train", "run.yaml"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")])
        )
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        seconds = time.monotonic() - start
        if done.returncode != 0:
            said = (done.stdout + done.stderr).strip().splitlines()[-5:]
            return {"targets": targets, "problems": [f"the run ended: {' | '.join(said)}"]}
        return _row(root / "runs" / "run", targets, seconds)


def _row(folder: Path, targets: list[str], seconds: float) -> Line:
    steps = records(folder, "step")
    with_state = RunStore.open(folder, keep=2)
    try:
        state = with_state.load("default").state
    finally:
        with_state.close()
    own: dict[bytes, Tensor] = {}  # a file has no tensors that are one: equal A are
    shared = {n: own.setdefault(bytes(t.numpy().data), t) for n, t in state.tensors.items()}
    unique = sum(t.nbytes for t in own.values())
    staleness = max(step["staleness_max"] for step in steps)
    problems = []
    if len(steps) != STEPS:
        problems.append(f"{len(steps)} steps of {STEPS}")
    if staleness > STALENESS:
        problems.append(f"staleness {staleness}, {STALENESS} is allowed")
    return {
        "targets": targets,
        "steps": len(steps),
        "seconds": round(seconds, 1),
        "staleness": staleness,
        "kl_sampler": max(step["kl_sampler"] for step in steps),
        "unique_bytes": unique,
        "sent_bytes": len(pack(AdapterState(spec=state.spec, tensors=shared))),
        "problems": problems,
    }


def _write(case: Case, root: Path) -> list[str]:
    """The run's files. Returns what it adapts."""
    side = SIDES[case.side]
    tokenizer = load_tokenizer(resolve_model(MODEL))
    folder = make_tiny(side.family, root / "model", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    targets = side.targets[case.engine != "embedded"]
    (root / "rewards.py").write_text(REWARD)
    (root / "rows.jsonl").write_text('{"question": "Say a number.", "answer": "1"}\n' * 64)
    config = tiny_run(
        steps=STEPS,
        lora={"lora_rank": 32, "lora_alpha": 32, "target_modules": targets},
        algo={"lr": 1e-3},
        train=dict(side.train),
        rollout={
            "kind": case.engine,
            "n_samples": 4,
            "max_new_tokens": 8,
            "max_head_offpolicyness": STALENESS,
            "max_context": 256,
        },
        publish={"kind": case.publisher},
        eval={"every": 0},
    )
    (root / "run.yaml").write_text(yaml.safe_dump(config))
    return targets


def section(found: Mapping[str, Line]) -> str:
    """Its part of docs/acceptance.md."""
    rows = [
        (
            *(CASES[name].side, CASES[name].engine, CASES[name].publisher),
            " ".join(row["targets"]),
            row.get("steps", "failed"),
            row.get("staleness", ""),
            f"{row['kl_sampler']:.0e}" if "kl_sampler" in row else "",
            f"{row['sent_bytes'] / row['unique_bytes']:.3f}" if "sent_bytes" in row else "",
        )
        for name, row in found.items()
    ]
    columns = ("train", "rollout", "publisher", "adapted", "steps", "staleness", "kl", "sent")
    return f"""## Pairs

{STEPS} asynchronous steps on a tiny model under the canary, staleness at most {STALENESS}.
`fsdp` is data-parallel over two processes, `megatron` tensor-parallel; `megatron_experts` has a mixture of experts dealt
to two. *KL* is the largest of a step between sampler and trainer. *Sent* is the bytes of a version
as it travels by http and xccl over those of its tensors, an A that layers share counted once.

`make acceptance ARGS=pairs`

{table(columns, rows)}
"""
