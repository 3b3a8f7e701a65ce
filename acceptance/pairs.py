"""Train engines with rollout engines by publishers: whole runs on a tiny model, canary on.

usage: python -m acceptance pairs [CASE ...]
A case is a run of `lorelei train` in which every step must be committed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from torch import Tensor

from acceptance.exported import TOLERANCE, exported_error
from acceptance.record import Line
from acceptance.stage import PUBLISHERS
from acceptance.table import table
from benchmarks.cases import MODEL
from lorelei.cli.trained_run import TrainedRun
from lorelei.inference.server.payload import pack
from lorelei.lora.state import AdapterState
from lorelei.lora.targets import FUSED
from lorelei.model.locate import resolve_model
from lorelei.model.tokenizer import load_tokenizer
from lorelei.obs.history import read_metrics
from tests.tiny_models import FOREIGN, make_tiny
from tests.tiny_runs import REWARD

STEPS, STALENESS = 5, 2
ATTENTION = ("linear_qkv", "linear_proj")
SHARDED = {"kind": "fsdp", "data_parallel": 2, "gradient_checkpointing": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """A train engine, its model and what is adapted."""

    train: Mapping[str, Any]
    family: str = "llama"
    targets: Sequence[str] = ("all-linear",)
    on_servers: Sequence[str] | None = None  # where servers on a CPU cannot adapt all of it
    staleness: int = 0
    ways: Mapping[str, Sequence[str]] = field(default_factory=lambda: PUBLISHERS)  # to servers
    model: Mapping[str, Any] = field(default_factory=dict)  # fields of config.json


TRAIN: dict[str, Side] = {  # another one is another entry
    "fsdp": Side(train=SHARDED),
    "megatron": Side(
        train={"kind": "megatron", "tensor_parallel": 2}, targets=tuple(FUSED), staleness=STALENESS
    ),
    "megatron_experts": Side(
        train={"kind": "megatron", "data_parallel": 2, "expert_parallel": 2},
        family="qwen3_moe",
        targets=tuple(FUSED),
        on_servers=ATTENTION,
        staleness=STALENESS,
    ),
    # no model of our own decoder: servers sample
    "fsdp_mistral": Side(
        train=SHARDED,
        family="mistral",
        ways={kind: PUBLISHERS[kind] for kind in ("vllm", "sglang")},
        model={"sliding_window": None},  # SGLang keeps to none
    ),
    "fsdp_gemma2": Side(train=SHARDED, family="gemma2", ways={"vllm": ("disk",)}),
    "fsdp_phi": Side(train=SHARDED, family="phi", ways={"vllm": ("http",)}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A train engine, a rollout engine, and the way between them."""

    train: str
    engine: str  # that samples
    publisher: str


CASES = {
    f"{rollout}-{publisher}-{train}": Case(train=train, engine=rollout, publisher=publisher)
    for train, side in TRAIN.items()
    for rollout, publishers in side.ways.items()
    for publisher in publishers
}


async def measure(case: Case) -> Line:
    """One row."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        config = folder / "run.yaml"
        config.write_text(yaml.safe_dump(_config(case, folder)))
        command = [sys.executable, "-m", "lorelei", "train", str(config)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        start = time.perf_counter()
        done = subprocess.run(command, env=environment, stdout=sys.stderr)
        seconds = time.perf_counter() - start
        run = folder / "runs" / "run"
        metrics = run / "metrics.jsonl"
        (steps,) = read_metrics(metrics).steps.values() if metrics.exists() else ([],)
        side, ended = TRAIN[case.train], done.returncode == 0
        sent = _sent(TrainedRun.read(run).state("default")) if ended else None
        exported = exported_error(run) if ended and side.family in FOREIGN else None
    row = {
        "steps": len(steps),
        "exit": done.returncode,
        "staleness": max((step.staleness_max for step in steps), default=None),
        "most_staleness": side.staleness,
        "targets": list(_targets(case)),
        "sent": sent,
        "exported": exported,
        "kl_sampler": max((step.kl_sampler for step in steps), default=None),
        "ratio_max": max((step.ratio_max for step in steps), default=None),
        "step_s": round(median([step.step_seconds for step in steps] or [0]), 2),
        "run_s": round(seconds, 1),
    }
    return {**row, "problems": problems(row)}


def _sent(state: AdapterState) -> float:
    """Bytes of a version by http and xccl over those of its tensors, a shared A once in both."""
    own: dict[bytes, Tensor] = {}  # in a file no two tensors are one; those of equal bytes are
    tensors = {n: own.setdefault(bytes(t.numpy().data), t) for n, t in state.tensors.items()}
    sent = len(pack(AdapterState(spec=state.spec, tensors=tensors)))
    return round(sent / sum(t.nbytes for t in own.values()), 4)


def _targets(case: Case) -> Sequence[str]:
    side = TRAIN[case.train]
    return side.on_servers if side.on_servers and case.engine != "embedded" else side.targets


def problems(row: Line) -> list[str]:
    """What does not hold in a row."""
    found: list[str] = []
    if row["exit"] != 0:
        found.append(f"the run ended with exit status {row['exit']}")
    if row["steps"] != STEPS:
        found.append(f"{row['steps']} of {STEPS} steps were committed")
    elif row["staleness"] > row["most_staleness"]:
        found.append(f"staleness {row['staleness']}, {row['most_staleness']} is allowed")
    elif not row["most_staleness"] and row["kl_sampler"] > 1e-6:
        found.append(f"sampler and trainer differ: kl_sampler {row['kl_sampler']:.1e}")
    if row["sent"] is not None and row["sent"] > 1.05:
        found.append(f"{row['sent']} times the adapter's bytes are sent, 1.05 is allowed")
    if (error := row.get("exported")) is not None and error > TOLERANCE:
        found.append(f"peft's log-probabilities of the exported adapter are {error:.1e} off")
    return found


def _config(case: Case, folder: Path) -> dict[str, Any]:
    tokenizer = load_tokenizer(resolve_model(MODEL))
    side = TRAIN[case.train]
    sizes = {"vocab_size": len(tokenizer), **side.model}
    model = make_tiny(side.family, folder / "model", **sizes)
    tokenizer.save_pretrained(model)
    rows = [{"question": f"Say the number {n}.", "answer": str(n)} for n in range(64)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(REWARD)
    return {
        "model": str(model),
        "runs_dir": str(folder / "runs"),
        "steps": STEPS,
        "threads": 1,
        # of a rank that makes names and shapes small beside the numbers
        "lora": {"lora_rank": 32, "lora_alpha": 64, "target_modules": list(_targets(case))},
        "train": dict(side.train),
        "rollout": {
            "kind": case.engine,
            "n_samples": 4,
            "max_new_tokens": 16,
            "max_running": 16,
            "max_context": 256,
            "max_head_offpolicyness": side.staleness,
        },
        "publish": {"kind": case.publisher},
        "task": {"kind": "jsonl", "path": "rows.jsonl"},
        "reward": {"kind": "python", "path": "rewards.py:vowels", "workers": 1},
        "algo": {"lr": 1.0e-2, "batch_size": 2},
        "eval": {"every": 0},
    }


def section(found: Mapping[str, Line]) -> str:
    """Its part of docs/acceptance.md."""
    rows = [
        (
            CASES[name].train,
            CASES[name].engine,
            CASES[name].publisher,
            " ".join(row["targets"]),
            f"{row['steps']} of {STEPS}",
            "-" if row["staleness"] is None else f"{row['staleness']:g}",
            "-" if row["sent"] is None else f"{row['sent']:.3f}",
            "-" if row["kl_sampler"] is None else f"{row['kl_sampler']:.1e}",
            "-" if row.get("exported") is None else f"{row['exported']:.1e}",
            f"{row['step_s']:.2f}",
            f"{row['run_s']:.0f}",
        )
        for name, row in found.items()
    ]
    columns = (
        *("train", "rollout", "publisher", "adapted", "steps", "staleness", "sent", "kl_sampler"),
        *("export", "step, s", "whole run, s"),
    )
    words = ", ".join(
        f"{name} with {', '.join(f'{k}: {v}' for k, v in side.train.items() if k != 'kind')}"
        for name, side in TRAIN.items()
    )
    return f"""## Train engines with rollout engines

{STEPS} steps of `lorelei train` on a tiny model, the canary on ({words}). *Staleness* is
that of the stalest step; where it is 0 the run is synchronous, and *kl_sampler*, the largest of the
steps, is 0 when sampler and trainer compute the same policy. *Sent* is the bytes of a version by
http and xccl over those of its tensors, an A that layers share counted once. *Whole run* starts and
ends the processes and the server too. `fsdp_mistral`, `fsdp_gemma2` and `fsdp_phi` train
models that only transformers and the servers build; *export* is the largest difference, in nats,
between the log-probabilities of the train engine and of peft with what `lorelei export` writes.

`make acceptance ARGS=pairs`

{table(columns, rows)}
"""
