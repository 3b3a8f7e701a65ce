"""A GRPO step of SmolLM2-135M with LoRA r=16 on all linear layers, fp32: Lorelei beside TRL.

usage: python -m benchmarks.grpo_step [CASE ...]   (make bench)
The two take turns (A B A B), each turn in a fresh process; the first step of a turn warms up and
is left out. Writes benchmarks/results/grpo_step.json: medians, spread, ratios.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.cases import MODEL, STEP_CASES
from benchmarks.machine import machine
from benchmarks.peers.environment import peers_python
from lorelei.config.paths import resolve_model
from lorelei.config.threads import physical_cores

RESULT = Path("benchmarks/results/grpo_step.json")
TURNS, STEPS = 2, 3

Step = dict[str, Any]


def run(command: list[str], **settings: str) -> list[Step]:
    """The steps that a program prints, without the first."""
    threads = {"OMP_NUM_THREADS": str(physical_cores()), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, env={**os.environ, **threads, **settings}, stdout=subprocess.PIPE, check=True
    )
    lines = [line for line in done.stdout.decode().splitlines() if line.startswith('{"')]
    return [json.loads(line) for line in lines][1:]


def ours(case: str) -> list[Step]:
    # one malloc arena, as the command line sets it
    return run(
        [sys.executable, "-m", "benchmarks.ours_step", case, str(STEPS)], MALLOC_ARENA_MAX="1"
    )


def trl(case: str) -> list[Step]:
    # waiting threads that spin: the faster setting for TRL on a quiet machine
    folder = str(resolve_model(MODEL))
    command = [str(peers_python()), "-m", "benchmarks.peers.trl_step", case, str(STEPS), folder]
    return run(command, OMP_WAIT_POLICY="active")


def summary(steps: list[Step]) -> dict[str, Any]:
    """Medians of wall-clock and CPU seconds by phase, the spread of the step, and peak memory."""
    found: dict[str, Any] = {"steps": len(steps), "peak_gib": max(s["peak_gib"] for s in steps)}
    for phase in ("step", "generate", "train"):
        if phase in steps[0]:
            found[f"{phase}_s"] = round(median(s[phase][0] for s in steps), 2)
            found[f"{phase}_cpu_s"] = round(median(s[phase][1] for s in steps), 2)
    walls = [s["step"][0] for s in steps]
    found["step_s_range"] = [round(min(walls), 2), round(max(walls), 2)]
    return found


def main() -> None:
    results: dict[str, Any] = {}
    for name in sys.argv[1:] or STEP_CASES:
        mine: list[Step] = []
        theirs: list[Step] = []
        for _ in range(TURNS):
            mine += ours(name)
            theirs += trl(name)
        a, b = summary(mine), summary(theirs)
        a["generated"] = mine[0]["generated"]
        b["train_s"] = round(b["step_s"] - b["generate_s"], 2)
        results[name] = {
            "lorelei": a,
            "trl": b,
            "times_faster": round(b["step_s"] / a["step_s"], 2),
            "times_less_cpu": round(b["step_cpu_s"] / a["step_cpu_s"], 2),
            "share_of_memory": round(a["peak_gib"] / b["peak_gib"], 3),
        }
        sys.stdout.write(json.dumps({name: results[name]}, indent=2) + "\n")
        sys.stdout.flush()
        record = {"machine": machine(), "peer": "trl 1.16.0", "cases": results}
        RESULT.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
