"""Forward and backward of archon beside the bare matrix products that it needs.

usage: python -m benchmarks.forward_backward [CASE ...]   (make bench ARGS=forward_backward)
SmolLM2-135M, LoRA r=16 on all linear layers, fp32. A fresh process a round; in it a training pass
and the products take turns. Writes benchmarks/results/forward_backward.json.
"""

from __future__ import annotations

import json
import sys
from statistics import median
from typing import Any

from benchmarks.train_case import TrainCase
from benchmarks.turns import Line, begun, keep, run

CASES = {
    case.name: case
    for case in (
        TrainCase(name="2 x (64 + 8 x 56)", groups=2, samples=8, prompt_tokens=64, new_tokens=57),
        TrainCase(name="512 + 8 x 64", groups=1, samples=8, prompt_tokens=512, new_tokens=65),
        TrainCase(name="8 x 256", groups=8, samples=1, prompt_tokens=192, new_tokens=65),
    )
}
ROUNDS, TURNS = 2, 5


def summary(case: TrainCase, lines: list[Line]) -> dict[str, Any]:
    """Medians over all turns, by part and in total; the share turn by turn."""
    own = [sum(line["own"].values()) for line in lines]
    bare = [sum(line["bare"].values()) for line in lines]
    shares = [b / a for a, b in zip(own, bare, strict=True)]
    read = case.groups * (case.prompt_tokens + case.samples * (case.new_tokens - 1))
    parts = {
        part: {
            "own_s": round(median(line["own"][part] for line in lines), 4),
            "bare_s": round(median(line["bare"].get(part, 0.0) for line in lines), 4),
        }
        for part in sorted(lines[0]["own"])
    }
    return {
        "turns": len(lines),
        "tokens": read,
        "predicted": case.groups * case.samples * case.new_tokens,
        "own_s": round(median(own), 3),
        "own_s_range": [round(min(own), 3), round(max(own), 3)],
        "bare_s": round(median(bare), 3),
        "share": round(median(shares), 3),
        "share_range": [round(min(shares), 3), round(max(shares), 3)],
        "parts": parts,
    }


def section(record: dict[str, Any]) -> str:
    """The part of docs/benchmarks.md."""
    lines = [
        "## Forward and backward beside bare matrix products",
        "",
        "One forward_backward of archon (SmolLM2-135M, LoRA r=16 on all linear layers, fp32), "
        "against the sum of the times of every matrix product it needs, each as a plain "
        "`torch.mm` or `torch.bmm` over the same weights and shapes, with results written into "
        "buffers made before; a causal square counts half. The two take turns in one process. "
        "Frozen products of ours use a blocked layout, which is faster than `torch.mm` at some "
        "shapes. A case "
        "`groups x (prompt + samples x new tokens)` shares its prompts; `8 x 256` shares none.",
        "",
        "`make bench ARGS=forward_backward`",
        "",
        "| case | tokens | predicted | seconds | spread | products alone | share | spread |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, case in record["cases"].items():
        own, share = case["own_s_range"], case["share_range"]
        lines.append(
            f"| {name} | {case['tokens']} | {case['predicted']} | {case['own_s']:.2f} "
            f"| {own[0]:.2f}-{own[1]:.2f} | {case['bare_s']:.2f} | {case['share']:.0%} "
            f"| {share[0]:.0%}-{share[1]:.0%} |"
        )
    for name, case in record["cases"].items():
        lines += ["", f"{name}, milliseconds by part:", "", "| part | ours | products alone |"]
        lines.append("|---|---|---|")
        for part, times in case["parts"].items():
            bare = f"{times['bare_s'] * 1000:.0f}" if times["bare_s"] else ""
            lines.append(f"| {part} | {times['own_s'] * 1000:.0f} | {bare} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    results: dict[str, Any] = begun("forward_backward", sys.argv[1:])
    for name in sys.argv[1:] or CASES:
        command = [sys.executable, "-m", "benchmarks.ours_forward_backward", name, str(TURNS)]
        # one malloc arena, as the command line sets it
        lines = [line for _ in range(ROUNDS) for line in run(command, MALLOC_ARENA_MAX="1")]
        results[name] = summary(CASES[name], lines)
        sys.stdout.write(json.dumps({name: results[name]}, indent=2) + "\n")
        sys.stdout.flush()
        keep("forward_backward", {"cases": results})


if __name__ == "__main__":
    main()
