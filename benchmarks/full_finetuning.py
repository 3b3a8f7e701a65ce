"""LoRA beside full fine-tuning of the same model, both by Lorelei, in the same GRPO step.

usage: python -m benchmarks.full_finetuning [CASE ...]   (make bench ARGS=full_finetuning)
The two take turns (A B A B), each turn in a fresh process; the first step of a turn warms up and
is left out. Writes benchmarks/results/full_finetuning.json.
"""

from __future__ import annotations

import json
import sys
from statistics import median
from typing import Any

from benchmarks.cases import ALPHA, MODEL, RANK
from benchmarks.turns import Line, begun, keep, run

CASES = ("2x8",)
SIDES = {"lora": "LoRA", "full": "full fine-tuning"}
PHASES = ("step", "generate", "train", "publish")
TURNS, STEPS = 3, 3  # steps of one turn, the first included


def turn(case: str, side: str) -> tuple[list[Line], Line]:
    """The steps of one process without the first, and its checkpoint."""
    command = [sys.executable, "-m", "benchmarks.full_step", case, str(STEPS), side]
    # one malloc arena, as the command line sets it
    _, *steps, checkpoint = run(command, MALLOC_ARENA_MAX="1")
    return steps, checkpoint


def summary(turns: list[tuple[list[Line], Line]]) -> dict[str, Any]:
    """Medians of wall-clock seconds with the spread of the step, peak memory, sizes."""
    steps = [step for done, _ in turns for step in done]
    checkpoint = turns[0][1]
    walls = [step["step"][0] for step in steps]
    return {
        "steps": len(steps),
        **{f"{phase}_s": round(median(s[phase][0] for s in steps), 2) for phase in PHASES},
        "step_s_range": [round(min(walls), 2), round(max(walls), 2)],
        "peak_gib": max(step["peak_gib"] for step in steps),
        "checkpoint_bytes": checkpoint["bytes"],
        "trained_parameters": checkpoint["trained"],
    }


def main() -> None:
    results: dict[str, Any] = begun("full_finetuning", sys.argv[1:])
    for case in sys.argv[1:] or CASES:
        done: dict[str, list[tuple[list[Line], Line]]] = {side: [] for side in SIDES}
        for _ in range(TURNS):
            for side in SIDES:
                done[side].append(turn(case, side))
        lora, full = (summary(done[side]) for side in SIDES)
        results[case] = {
            "lora": lora,
            "full": full,
            "ratios": {
                field: round(full[field] / lora[field], 2)
                for field in lora
                if field not in ("steps", "step_s_range")
            },
        }
        sys.stdout.write(json.dumps({case: results[case]}, indent=2) + "\n")
        sys.stdout.flush()
        keep("full_finetuning", {"model": MODEL, "rank": RANK, "alpha": ALPHA, "cases": results})


def section(record: Line) -> str:
    """Its part of docs/benchmarks.md."""
    rows: list[str] = []
    for case, sides in record["cases"].items():
        for side, label in SIDES.items():
            s = sides[side]
            low, high = s["step_s_range"]
            cells = (
                *(case, label, f"{s['trained_parameters']:,}", f"{s['peak_gib']:.2f}"),
                f"{s['step_s']:.2f} ({low:.2f} to {high:.2f})",
                *(f"{s[f'{phase}_s']:.2f}" for phase in PHASES[1:]),
                f"{s['checkpoint_bytes'] / 2**20:,.0f}",
            )
            rows.append(f"| {' | '.join(cells)} |")
        r = sides["ratios"]
        fields = ("trained_parameters", "peak_gib", *(f"{p}_s" for p in PHASES), "checkpoint_bytes")
        rows.append(f"| {case} | full / LoRA | {' | '.join(f'{r[f]:.2f}' for f in fields)} |")
    # each side keeps this much that only LoRA's result needs
    base = record["cases"][next(iter(record["cases"]))]["full"]["trained_parameters"] * 4 / 2**30
    table = "\n".join(rows)
    return f"""## LoRA beside full fine-tuning

The same GRPO step (archon, embedded, fp32) with LoRA r={record["rank"]} on all linear layers and
with `lora.use_lora: false`, which trains every weight. The two take turns in fresh processes; the
first step of a process is left out. Seconds are medians, with the smallest and the largest step
in parentheses. Peak memory is that of the steps, without writing a checkpoint. Both sides keep
the untrained base model ({base:.2f} GiB of weights), which full fine-tuning needs only for the KL
term and for scores of the base. Making a version fast to decode is part of `generate` for LoRA and
of `publish` for full weights. A checkpoint holds the trained weights and both moments of Adam.

`make bench ARGS=full_finetuning`

| case | side | trained parameters | peak, GiB | step, s | generate, s | train, s | publish, s | checkpoint, MiB |
|---|---|---|---|---|---|---|---|---|
{table}
"""  # noqa: E501 - a table's header is one line


if __name__ == "__main__":
    main()
