"""Asynchronous beside synchronous training on the same work.

usage: python -m acceptance asynchronous [CASE ...]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from acceptance.record import Line
from acceptance.table import table
from lorelei.obs.records import StepRecord, step_record

RECIPE = "recipes/chain_sum/run.yaml"
STEPS, STALENESS = 10, 2
SIDES = {"synchronous": 0, "asynchronous": STALENESS}
SERVER = ("threads=1", "rollout.max_context=512", "rollout.max_running=16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A rollout engine, with a publisher that reaches it."""

    engine: str
    publisher: str


CASES = {
    "embedded": Case(engine="embedded", publisher="memory"),
    "vllm": Case(engine="vllm", publisher="xccl"),
    "sglang": Case(engine="sglang", publisher="xccl"),
}


async def measure(case: Case) -> Line:
    """One row."""
    sides = {side: summary(_trained(case, staleness)) for side, staleness in SIDES.items()}
    ratio = sides["asynchronous"]["step_s"] / sides["synchronous"]["step_s"]
    row = {"steps": STEPS, "sides": sides, "ratio": round(ratio, 3)}
    return row | {"problems": problems(row)}


def _trained(case: Case, staleness: int) -> list[Mapping[str, Any]]:
    """The lines of metrics.jsonl of a run's steps but the first, which warms up."""
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
            *(SERVER if case.engine != "embedded" else ()),
        )
        command = [sys.executable, "-m", "lorelei", "train", RECIPE, *overrides]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        subprocess.run(command, env=environment, stdout=sys.stderr, check=True)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if line["kind"] == "step"]
    return steps[1:]


def summary(lines: Sequence[Mapping[str, Any]]) -> Line:
    """Seconds of a step, who waits for whom, how old the tokens are, and what the canary saw."""
    steps = [step_record(line) for line in lines]
    total = sum(step.step_seconds for step in steps)
    return {
        "steps": len(steps),
        "step_s": round(total / len(steps), 3),
        "train_s": _each(steps, lambda step: step.seconds["train"]),
        "trainer_idle": _each(steps, lambda step: step.trainer_idle),
        "rollout_idle": _each(steps, lambda step: step.rollout_idle),
        "staleness_mean": _each(steps, lambda step: step.staleness_mean),
        "staleness_max": max(step.staleness_max for step in steps),
        "dropped_stale": _each(steps, lambda step: step.dropped_stale),
        "kl_sampler": mean(step.kl_sampler for step in steps),
        "tokens_per_s": round(sum(step.generated_tokens for step in steps) / total, 1),
        "canary": [line["canary_version"] for line in lines if "canary_version" in line],
        "told_apart": sum(line.get("canary_told_apart", 0) for line in lines),
    }


def _each(steps: Sequence[StepRecord], value: Callable[[StepRecord], float]) -> float:
    return round(mean(map(value, steps)), 3)


def problems(row: Line) -> list[str]:
    """What must hold and does not."""
    found: list[str] = []
    for side, values in row["sides"].items():
        if values["steps"] < STEPS:
            found.append(f"{side}: {values['steps']} of {STEPS} steps")
        if values["staleness_max"] > SIDES[side]:
            found.append(
                f"{side}: tokens of {values['staleness_max']:g} versions ago were trained on, "
                f"max_head_offpolicyness is {SIDES[side]}"
            )
        if len(values["canary"]) < values["steps"]:
            found.append(f"{side}: the canary saw {len(values['canary'])} of the steps")
    return found


COLUMNS = (
    "engine",
    "publisher",
    "training",
    "step, s",
    "against synchronous",
    "trainer idle",
    "sampler idle",
    "staleness, mean / most",
    "dropped",
    "tokens/s",
    "canary, at most",
    "told apart",
)


def section(found: Mapping[str, Line]) -> str:
    """Its part of docs/acceptance.md."""
    rows = [
        (
            *(CASES[name].engine, CASES[name].publisher, side),
            f"{values['step_s']:.2f}",
            f"{row['ratio']:.2f}" if side == "asynchronous" else "1",
            f"{values['trainer_idle']:.0%}",
            f"{values['rollout_idle']:.0%}",
            f"{values['staleness_mean']:.2f} / {values['staleness_max']:g}",
            f"{values['dropped_stale']:.0%}",
            f"{values['tokens_per_s']:.0f}",
            f"{max(values['canary']):.1e}",
            f"{values['told_apart']:g} of {values['steps']}",
        )
        for name, row in found.items()
        for side, values in row["sides"].items()
    ]
    return f"""## Asynchronous beside synchronous

{STEPS} steps of the recipe `chain_sum` (SmolLM2-135M, rank 16) with 4 prompts x 4 samples, after
one that warms up, with `max_head_offpolicyness` 0 and {STALENESS}: one run each. *Idle* is the
share of a step in which the trainer waits for rollouts, and that without a request in flight;
*dropped* the share of finished groups that had become too old. The canary compares the server's
score of fixed tokens with the trainer's after every publication: its largest distance in nats, and
how many versions it could tell from the one before. Trainer and sampler share the cores, so that
what one gains the other pays; on machines of their own the idle share is what asynchronous
training gives back.

`make acceptance ARGS=asynchronous`

{table(COLUMNS, rows)}
"""
