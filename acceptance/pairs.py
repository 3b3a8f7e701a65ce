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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from acceptance.record import Line
from acceptance.stage import PUBLISHERS
from acceptance.table import table
from benchmarks.cases import MODEL
from lorelei.config.paths import resolve_model
from lorelei.model.tokenizer import load_tokenizer
from lorelei.obs.history import read_metrics
from tests.tiny_models import make_tiny
from tests.tiny_runs import REWARD

STEPS = 5
TRAIN: dict[str, dict[str, Any]] = {  # train engines; another one is another entry
    "fsdp": {"kind": "fsdp", "data_parallel": 2, "gradient_checkpointing": True},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A train engine, a rollout engine, and the way between them."""

    train: str
    rollout: str
    publisher: str


CASES = {
    f"{rollout}-{publisher}-{train}": Case(train=train, rollout=rollout, publisher=publisher)
    for train in TRAIN
    for rollout, publishers in PUBLISHERS.items()
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
        metrics = folder / "runs" / "run" / "metrics.jsonl"
        (steps,) = read_metrics(metrics).steps.values() if metrics.exists() else ([],)
    row = {
        "steps": len(steps),
        "exit": done.returncode,
        "kl_sampler": max((step.kl_sampler for step in steps), default=None),
        "ratio_max": max((step.ratio_max for step in steps), default=None),
        "step_s": round(median([step.step_seconds for step in steps] or [0]), 2),
        "run_s": round(seconds, 1),
    }
    return {**row, "problems": problems(row)}


def problems(row: Line) -> list[str]:
    """What does not hold in a row."""
    found: list[str] = []
    if row["exit"] != 0:
        found.append(f"the run ended with exit status {row['exit']}")
    if row["steps"] != STEPS:
        found.append(f"{row['steps']} of {STEPS} steps were committed")
    elif row["kl_sampler"] > 1e-6:
        found.append(f"sampler and trainer differ: kl_sampler {row['kl_sampler']:.1e}")
    return found


def _config(case: Case, folder: Path) -> dict[str, Any]:
    tokenizer = load_tokenizer(resolve_model(MODEL))
    model = make_tiny("llama", folder / "model", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(model)
    rows = [{"question": f"Say the number {n}.", "answer": str(n)} for n in range(64)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(REWARD)
    return {
        "model": str(model),
        "runs_dir": str(folder / "runs"),
        "steps": STEPS,
        "threads": 1,
        "lora": {"lora_rank": 4, "lora_alpha": 8},
        "train": TRAIN[case.train],
        "rollout": {
            "kind": case.rollout,
            "n_samples": 4,
            "max_new_tokens": 16,
            "max_running": 16,
            "max_context": 256,
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
            CASES[name].rollout,
            CASES[name].publisher,
            f"{row['steps']} of {STEPS}",
            "-" if row["kl_sampler"] is None else f"{row['kl_sampler']:.1e}",
            f"{row['step_s']:.2f}",
            f"{row['run_s']:.0f}",
        )
        for name, row in found.items()
    ]
    columns = ("train", "rollout", "publisher", "steps", "kl_sampler", "step, s", "whole run, s")
    words = ", ".join(
        f"{name} with {', '.join(f'{k}: {v}' for k, v in options.items() if k != 'kind')}"
        for name, options in TRAIN.items()
    )
    return f"""## Train engines with rollout engines

{STEPS} synchronous steps of `lorelei train` on a tiny Llama, the canary on ({words}). *kl_sampler*
is the largest of the steps: 0 when sampler and trainer compute the same policy. *Whole run* starts
and ends the processes and the server too.

`make acceptance ARGS=pairs`

{table(columns, rows)}
"""
