"""A GRPO step of SmolLM2-135M with LoRA r=16 on all linear layers, fp32: Lorelei beside TRL.

usage: python -m benchmarks.grpo_step [CASE ...]   (make bench ARGS='grpo_step 2x8')
The two take turns (A B A B), each turn in a fresh process; the first step of a turn warms up and
is left out. On a processor with AVX-512 the case 2x8 also runs with kernels for AVX2, as
processors without it get. Writes benchmarks/results/grpo_step.json: medians, spread, ratios.
"""

from __future__ import annotations

import json
import sys
from statistics import median
from typing import Any

from benchmarks.cases import MODEL, STEP_CASES
from benchmarks.peers.environment import peers_python
from benchmarks.turns import Line, begun, keep, pinned, run
from lorelei.model.kernels.fused import lanes
from lorelei.model.locate import resolve_model

TURNS = 2
AVX2 = {"LORELEI_CFLAGS": "-mno-avx512f"}  # see lorelei/model/kernels/build.py


def ours(case: str, **settings: str) -> list[Line]:
    steps = str(STEP_CASES[case].steps)
    # one malloc arena, as the command line sets it
    command = [sys.executable, "-m", "benchmarks.ours_step", case, steps]
    return run(command, MALLOC_ARENA_MAX="1", **settings)[1:]


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
        narrow: list[Line] = []
        theirs: list[Line] = []
        for _ in range(TURNS):
            mine += ours(name)
            narrow += ours(name, **AVX2) if name == "2x8" and lanes() > 8 else []
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
        if narrow:
            c = summary(narrow)
            faster = round(b["step_s"] / c["step_s"], 2)
            results[name] |= {"lorelei_avx2": c, "times_faster_avx2": faster}
        sys.stdout.write(json.dumps({name: results[name]}, indent=2) + "\n")
        sys.stdout.flush()
        keep("grpo_step", {"peer": pinned("trl"), "cases": results})


def section(record: Line) -> str:
    """Its part of docs/benchmarks.md."""
    rows = []
    for name, case in record["cases"].items():
        sides = {
            "lorelei": "Lorelei",
            "lorelei_avx2": "Lorelei, kernels for AVX2",
            "trl": record["peer"],
        }
        for side, label in sides.items():
            if (s := case.get(side)) is None:
                continue
            low, high = s["step_s_range"]
            seconds = f"{s['step_s']} ({low} to {high})"
            cells = (name, label, seconds, s["generate_s"], s["train_s"], s["step_cpu_s"])
            rows.append(f"| {' | '.join(map(str, cells))} | {s['peak_gib']:.2f} |")
        faster, cpu = f"{case['times_faster']} times faster", case["times_less_cpu"]
        if "times_faster_avx2" in case:
            faster += f", {case['times_faster_avx2']} with AVX2"
        memory = f"{case['share_of_memory']:.2f} of it"
        rows.append(f"| {name} | ratio | {faster} | | | {cpu} times less | {memory} |")
    table = "\n".join(rows)
    return f"""## A GRPO step

Sampling, scoring, forward, backward, optimizer step and, for Lorelei, publishing the new version:
SmolLM2-135M, fp32, LoRA r=16 on all linear layers, beside {record["peer"]} with peft. `2x8` is
2 prompts with 8 samples of exactly 64 new tokens each; `prompt512` has prompts of about 512
tokens, `new512` has 512 new tokens. Both sides have the same prompts and rewards and take turns
in fresh processes; the first step of a process is left out. Numbers are medians, with the
smallest and largest step in parentheses.

Ratios depend on the processor: our kernels use AVX-512 where there is one. Where *kernels for AVX2*
is listed, they were compiled as for a processor without it (`LORELEI_CFLAGS=-mno-avx512f`).

`make bench ARGS=grpo_step`

| case | side | step, s | generate, s | train, s | step, CPU s | peak, GiB |
|---|---|---|---|---|---|---|
{table}
"""


if __name__ == "__main__":
    main()
