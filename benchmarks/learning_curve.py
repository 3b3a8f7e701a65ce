"""Trains the chain_sum recipe with three seeds and draws the README's curve.

usage: python -m benchmarks.learning_curve [key=value ...]   (make curve)
Writes benchmarks/results/learning_curve.json and docs/learning_curve.png.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.curves import render_curves
from benchmarks.machine import machine
from lorelei.obs.history import read_metrics

SEEDS = (0, 1, 2)
RECIPE = "recipes/chain_sum/run.yaml"


def main() -> None:
    runs: list[Path] = []
    results: list[dict[str, object]] = []
    for seed in SEEDS:
        name = f"chain_sum-seed{seed}"
        command = [sys.executable, "-m", "lorelei", "train", RECIPE, f"seed={seed}", f"name={name}"]
        start = time.perf_counter()
        subprocess.run([*command, *sys.argv[1:]], check=True)
        seconds = time.perf_counter() - start
        runs.append(Path("runs") / name)
        evals = read_metrics(runs[-1] / "metrics.jsonl").evals["default"]
        first, last = evals[0], evals[-1]
        results.append(
            {"seed": seed, "seconds": round(seconds), "steps": last.step, "problems": last.n}
            | {f"{k}_first": first.scores[k] for k in ("strict", "lenient")}
            | {f"{k}_last": last.scores[k] for k in ("strict", "lenient")}
        )
    record = {"recipe": RECIPE, "machine": machine(), "runs": results}
    Path("benchmarks/results/learning_curve.json").write_text(json.dumps(record, indent=2) + "\n")
    title = "SmolLM2-135M learns to answer sums, LoRA r=16, on 2 CPU cores"
    render_curves(runs, Path("docs/learning_curve.png"), title)


if __name__ == "__main__":
    main()
