"""Asynchronous beside synchronous training on the same work.

usage: python -m acceptance asynchronous [CASE ...]
The two take turns (A B A B), each turn a run of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from acceptance.record import Line
from acceptance.table import table
from lorelei.obs.history import read_metrics
from lorelei.obs.records import StepRecord

RECIPE = "recipes/chain_sum/run.yaml"
TURNS, STEPS, STALENESS = 2, 10, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A rollout engine, with the publisher that needs nothing but itself."""

    engine: str
    publisher: str


CASES = {
    "embedded": Case(engine="embedded", publisher="memory"),
    "vllm": Case(engine="vllm", publisher="xccl"),
    "sglang": Case(engine="sglang", publisher="xccl"),
}


async def measure(case: Case) -> Line:
    """One row."""
    turns: dict[int, list[Line]] = {0: [], STALENESS: []}
    for _ in range(TURNS):
        for staleness, results in turns.items():
            results.append(summary(_trained(case, staleness)))
    sides = {
        side: {key: round(mean(turn[key] for turn in turns[staleness]), 3) for key in turns[0][0]}
        for side, staleness in (("synchronous", 0), ("asynchronous", STALENESS))
    }
    ratio = sides["asynchronous"]["step_s"] / sides["synchronous"]["step_s"]
    return {"steps": STEPS, "turns": TURNS, "sides": sides, "ratio": round(ratio, 3)} | {
        "problems": []
    }


def _trained(case: Case, staleness: int) -> list[StepRecord]:
    """The steps of a run but the first, which warms up."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = (
            f"runs_dir={folder}",
            "name=run",
            f"steps={STEPS + 1}",
            f"rollout.kind={case.engine}",
            f"publish.kind={case.publisher}",
            f"rollout.max_head_offpolicyness={staleness}",
            "rollout.n_samples=4",
            "algo.batch_size=4",
            "eval.every=0",
        )
        command = [sys.executable, "-m", "lorelei", "train", RECIPE, *overrides]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        subprocess.run(command, env=environment, stdout=sys.stderr, check=True)
        (steps,) = read_metrics(Path(folder) / "run" / "metrics.jsonl").steps.values()
    return list(steps[1:])


def summary(steps: list[StepRecord]) -> Line:
    """Seconds of a step, and the share of it in which the trainer waits for rollouts."""
    total = sum(step.step_seconds for step in steps)
    return {
        "step_s": total / len(steps),
        "train_s": sum(step.seconds["train"] for step in steps) / len(steps),
        "idle": sum(step.seconds["rollout"] for step in steps) / total,
        "staleness": mean(step.staleness_mean for step in steps),
        "kl_sampler": mean(step.kl_sampler for step in steps),
        "tokens_per_s": sum(step.generated_tokens for step in steps) / total,
    }


COLUMNS = (
    "engine",
    "publisher",
    "training",
    "step, s",
    "against synchronous",
    "trainer idle",
    "staleness",
    "tokens/s",
)


def section(found: Mapping[str, Line]) -> str:
    """Its part of docs/acceptance.md."""
    rows = [
        (
            *(CASES[name].engine, CASES[name].publisher, side),
            f"{values['step_s']:.2f}",
            f"{row['ratio']:.2f}" if side == "asynchronous" else "1",
            f"{values['idle']:.0%}",
            f"{values['staleness']:.2f}",
            f"{values['tokens_per_s']:.0f}",
        )
        for name, row in found.items()
        for side, values in row["sides"].items()
    ]
    return f"""## Asynchronous beside synchronous

{STEPS} steps of the recipe `chain_sum` (SmolLM2-135M, rank 16) with 4 prompts x 4 samples,
`max_head_offpolicyness` 0 and {STALENESS}, in {TURNS} turns each. *Idle* is the share of a step in
which the trainer waits for rollouts. Trainer and sampler share the cores, so that what one gains
the other pays; on machines of their own the idle share is what asynchronous training gives back.

`make acceptance ARGS=asynchronous`

{table(COLUMNS, rows)}
"""
