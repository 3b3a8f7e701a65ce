"""A GRPO step of SmolLM2-135M with LoRA r=16 on all linear layers, fp32: Lorelei beside TRL.

usage: python -m benchmarks.grpo_step [CASE ...]   (make bench ARGS='grpo_step 2x8')
The two take turns (A B A B), each turn in a fresh process; the first step of a turn warms up and
is left out. Writes benchmarks/results/grpo_step.json: medians, spread, ratios.
"""

from __future__ import annotations

import json
import sys
from statistics import median
from typing import Any

from benchmarks.cases import MODEL, STEP_CASES
from benchmarks.peers.environment import peers_python
from benchmarks.turns import Line, begun, keep, pinned, run
from lorelei.config.paths import resolve_model

TURNS = 2


def ours(case: str) -> list[Line]:
    steps = str(STEP_CASES[case].steps)
    # one malloc arena, as the command line sets it
    command = [sys.executable, "-m", "benchmarks.ours_step", case, steps]
    return run(command, MALLOC_ARENA_MAX="1")[1:]


def trl(case: str) -> list[Line]:
    steps = str(STEP_CASES[case].steps)
    # waiting threads that spin: the faster setting for TRL on a quiet machine
    folder = str(resolve_model(MODEL))
    command = [str(peers_python()), "-m", "benchmarks.peers.trl_step", case, steps, folder]
    return run(command, OMP_WAIT_POLICY="active")[1:]


def summary(steps: list[Line]) -> dict[str, Any]:
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
    results: dict[str, Any] = begun("grpo_step", sys.argv[1:])
    for name in sys.argv[1:] or STEP_CASES:
        mine: list[Line] = []
        theirs: list[Line] = []
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
        keep("grpo_step", {"peer": pinned("trl"), "cases": results})


def section(record: Line) -> str:
    """Its part of docs/benchmarks.md."""
    rows = []
    for name, case in record["cases"].items():
        for side, label in (("lorelei", "Lorelei"), ("trl", record["peer"])):
            s = case[side]
            low, high = s["step_s_range"]
            seconds = f"{s['step_s']} ({low} to {high})"
            cells = (name, label, seconds, s["generate_s"], s["train_s"], s["step_cpu_s"])
            rows.append(f"| {' | '.join(map(str, cells))} | {s['peak_gib']:.2f} |")
        faster, cpu = case["times_faster"], case["times_less_cpu"]
        memory = f"{case['share_of_memory']:.2f} of it"
        rows.append(f"| {name} | ratio | {faster} times faster | | | {cpu} times less | {memory} |")
    table = "\n".join(rows)
    return f"""## A GRPO step

Sampling, scoring, forward, backward, optimizer step and, for Lorelei, publishing the new version:
SmolLM2-135M, fp32, LoRA r=16 on all linear layers, beside {record["peer"]} with peft. `2x8` is
2 prompts with 8 samples of exactly 64 new tokens each; `prompt512` has prompts of about 512
tokens, `new512` has 512 new tokens. Both sides have the same prompts and rewards and take turns
in fresh processes; the first step of a process is left out. Numbers are medians, with the
smallest and largest step in parentheses.

Ratios depend on the processor: on one where TRL took as long and Lorelei nearly twice as long,
the same command gave 2.68 times for `2x8`, 3.01 for `4x8`, 8.12 for `2x8-prompt512` and 2.62 for
`2x8-new512` (benchmarks/results/grpo_step.json at commit 56cb91c, before a decoding step was one
call of a kernel).

`make bench ARGS=grpo_step`

| case | side | step, s | generate, s | train, s | step, CPU s | peak, GiB |
|---|---|---|---|---|---|---|
{table}
"""


if __name__ == "__main__":
    main()
