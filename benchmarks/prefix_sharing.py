"""Training with the prompt computed once for all its samples, beside once for each.

usage: python -m benchmarks.prefix_sharing [CASE ...]   (make bench ARGS=prefix_sharing)
forward_backward of archon, SmolLM2-135M, LoRA r=16 on all linear layers, fp32. Both sides run in
fresh processes, in turns. Writes benchmarks/results/prefix_sharing.json.
"""

from __future__ import annotations

import json
import sys
from statistics import median
from typing import Any

from benchmarks.train_case import TrainCase
from benchmarks.turns import Line, begun, keep, run

CASES = {
    f"{prompt} + {samples} x 64": TrainCase(
        name=f"{prompt} + {samples} x 64",
        groups=2 if prompt < 100 else 1,
        samples=samples,
        prompt_tokens=prompt,
        new_tokens=64,
    )
    for prompt in (40, 512)
    for samples in (8, 16)
}
ROUNDS, TURNS = 2, 2


def ours(case: str, *arguments: str) -> list[Line]:
    command = [sys.executable, "-m", "benchmarks.ours_prefix_sharing", case, *arguments]
    return run(command, MALLOC_ARENA_MAX="1")  # one malloc arena, as the command line sets it


def summary(lines: list[Line]) -> dict[str, Any]:
    """Median and spread of the wall-clock seconds of a pass."""
    walls = [line["pass"][0] for line in lines]
    return {
        "passes": len(walls),
        "tokens": lines[0]["tokens"],
        "seconds": round(median(walls), 3),
        "seconds_range": [round(min(walls), 3), round(max(walls), 3)],
        "peak_gib": max(line["peak_gib"] for line in lines),
    }


def section(record: dict[str, Any]) -> str:
    """The part of docs/benchmarks.md."""
    lines = [
        "## Sharing the prompt in training",
        "",
        "One forward_backward of archon (SmolLM2-135M, LoRA r=16 on all linear layers, fp32) over "
        "the samples of one long or two short prompts, `prompt + samples x new tokens`: with the "
        "prompt as one segment that its samples share, and with a copy of it in every sample. "
        "The difference is the largest over all tensors of the norm of the difference of "
        "gradients over their norm, in fp32 and in fp64. Sides take turns in fresh processes; "
        "seconds are medians, with the smallest and the largest.",
        "",
        "`make bench ARGS=prefix_sharing`",
        "",
        "| case | tokens shared / repeated | shared, s | repeated, s | times faster "
        "| difference fp32 | fp64 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, case in record["cases"].items():
        shared, repeated = case["shared"], case["repeated"]
        lines.append(
            f"| {name} | {shared['tokens']} / {repeated['tokens']} | {_seconds(shared)} "
            f"| {_seconds(repeated)} | {case['times_faster']} "
            f"| {case['difference']['torch.float32']:.1e} "
            f"| {case['difference']['torch.float64']:.1e} |"
        )
    return "\n".join(lines) + "\n"


def _seconds(side: dict[str, Any]) -> str:
    low, high = side["seconds_range"]
    return f"{side['seconds']:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    results: dict[str, Any] = begun("prefix_sharing", sys.argv[1:])
    for name in sys.argv[1:] or CASES:
        (difference,) = ours(name, "difference")
        lines: dict[str, list[Line]] = {"shared": [], "repeated": []}
        for _ in range(ROUNDS):
            for side, held in lines.items():
                held += ours(name, side, str(TURNS))
        sides = {side: summary(held) for side, held in lines.items()}
        ratio = sides["repeated"]["seconds"] / sides["shared"]["seconds"]
        results[name] = {**sides, "times_faster": round(ratio, 2), "difference": difference}
        sys.stdout.write(json.dumps({name: results[name]}, indent=2) + "\n")
        sys.stdout.flush()
        keep("prefix_sharing", {"cases": results})


if __name__ == "__main__":
    main()
