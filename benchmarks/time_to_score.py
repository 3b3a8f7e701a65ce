"""From the start of the program to a held-out score 0.3 above the beginning: Lorelei beside TRL.

usage: python -m benchmarks.time_to_score [SEED ...]   (make bench ARGS=time_to_score)
Lorelei is `lorelei train` with a run file, TRL a GRPOTrainer with an evaluation callback; task and
settings are in benchmarks/sums.py. Writes benchmarks/results/time_to_score.json and
docs/time_to_score.png.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from benchmarks import sums
from benchmarks.cases import ALPHA, MODEL, RANK
from benchmarks.peers.environment import peers_python
from benchmarks.turns import Line, begun, keep, pinned, run
from lorelei.data.source import make_source
from lorelei.model.locate import resolve_model
from lorelei.model.tokenizer import load_tokenizer
from lorelei.obs.figure import COLOURS, fit_y, label_ends, new_figure, room_x, titles
from lorelei.obs.history import read_metrics
from lorelei.run_file import load_config
from lorelei.types import Prompt

SEEDS = ("0", "1", "2")
PICTURE = Path("docs/time_to_score.png")

Curve = list[dict[str, float]]  # step, seconds since the program's start, held-out score


def run_file(folder: Path, seed: str) -> Path:
    """The task as a JSONL file and the run that trains on it, in a folder."""
    rows = "\n".join(json.dumps(row) for row in sums.problems())
    (folder / "problems.jsonl").write_text(rows)
    content = {
        "model": MODEL,
        "seed": int(seed),
        "steps": sums.STEPS,
        "runs_dir": str(folder),
        "lora": {"lora_rank": RANK, "lora_alpha": ALPHA},
        "rollout": {"n_samples": sums.SAMPLES, "max_new_tokens": sums.NEW_TOKENS},
        "task": {"kind": "jsonl", "path": "problems.jsonl"},
        "reward": {"kind": "python", "path": f"{sums.__file__}:score"},
        "algo": {"kind": "grpo", "lr": sums.LR, "batch_size": sums.PROMPTS},
        "eval": {"every": sums.EVAL_EVERY, "n_prompts": sums.HELD_OUT},
    }
    file = folder / "sums.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def ours(file: Path) -> Curve:
    """The curve of `lorelei train`, from the metrics that it writes."""
    start = time.time()
    run([sys.executable, "-m", "lorelei", "train", str(file)])
    history = read_metrics(file.parent / file.stem / "metrics.jsonl")
    steps = history.steps["default"]
    # the first step begins when the evaluation before it is over
    at = {0: steps[0].time - steps[0].step_seconds} | {s.step: s.time for s in steps}
    return [
        {"step": e.step, "seconds": round(at[e.step] - start, 1), "score": e.scores["reward"]}
        for e in history.evals["default"]
    ]


def trl(file: Path, seed: str) -> Curve:
    """The curve of GRPOTrainer on the same prompts in the same order."""
    (experiment,) = load_config(file).experiments()
    folder = resolve_model(MODEL)
    source = make_source(
        experiment.task,
        load_tokenizer(folder),
        experiment.seed,
        eval_size=experiment.eval_size,
    )
    train = [source.prompt(i) for i in range(sums.STEPS * sums.PROMPTS)]
    prompts = {"train": _rows(train), "held_out": _rows(source.eval_prompts(sums.HELD_OUT))}
    (file.parent / "prompts.json").write_text(json.dumps(prompts))
    command = [str(peers_python()), "-m", "benchmarks.peers.trl_score"]
    start = time.time()
    lines = run(
        [*command, str(file.parent / "prompts.json"), seed, str(folder)], OMP_WAIT_POLICY="active"
    )
    return [
        {"step": x["step"], "seconds": round(x["time"] - start, 1), "score": x["score"]}
        for x in lines
    ]


def _rows(prompts: list[Prompt]) -> list[dict[str, Any]]:
    return [{"prompt": list(p.messages), "answer": p.data["answer"]} for p in prompts]


def first_above(curve: Curve) -> dict[str, float] | None:
    """The first evaluation that is `GAIN` above the one before training."""
    wanted = curve[0]["score"] + sums.GAIN - 1e-9  # so that rounding never decides
    return next((point for point in curve if point["score"] >= wanted), None)


def main() -> None:
    results: dict[str, Any] = begun("time_to_score", sys.argv[1:], "seeds")
    for seed in sys.argv[1:] or SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            file = run_file(Path(folder), seed)
            curves = {"lorelei": ours(file), "trl": trl(file, seed)}
        a, b = (first_above(curve) for curve in curves.values())
        faster = round(b["seconds"] / a["seconds"], 2) if a and b else None
        results[seed] = {"curves": curves, "lorelei": a, "trl": b, "times_faster": faster}
        sys.stdout.write(json.dumps({seed: results[seed]}) + "\n")
        sys.stdout.flush()
        record = {"peer": pinned("trl"), "settings": settings(), **summary(results)}
        keep("time_to_score", record)
        draw(record, PICTURE)


def settings() -> dict[str, float]:
    return {
        "gain": sums.GAIN,
        "steps": sums.STEPS,
        "prompts": sums.PROMPTS,
        "samples": sums.SAMPLES,
        "new_tokens": sums.NEW_TOKENS,
        "lr": sums.LR,
        "eval_every": sums.EVAL_EVERY,
        "held_out": sums.HELD_OUT,
    }


def summary(seeds: dict[str, Any]) -> dict[str, Any]:
    """The seeds and their median; none when a side did not get there with one of them."""
    ratios = [seed["times_faster"] for seed in seeds.values()]
    return {"seeds": seeds, "times_faster": None if None in ratios else round(median(ratios), 2)}


def draw(record: Line, out: Path) -> None:
    """Held-out score over seconds: a line for every seed and side."""
    with new_figure(1000, 420, out) as figure:
        words = (
            "SmolLM2-135M learns the sums of two digits; a line is a seed, settings are the same"
        )
        titles(figure, "Held-out score since the start of the program", words)
        axes = figure.add_axes((0.06, 0.135, 0.92, 0.64))
        points = [p for s in record["seeds"].values() for c in s["curves"].values() for p in c]
        fit_y(axes, [p["score"] for p in points], at_least=0.2)
        room_x(axes, 0, max(p["seconds"] for p in points), len(record["peer"]))
        for side, label, colour in (
            ("lorelei", "Lorelei", COLOURS[0]),
            ("trl", record["peer"], COLOURS[1]),
        ):
            curves = [seed["curves"][side] for seed in record["seeds"].values()]
            for curve in curves:
                x, y = [p["seconds"] for p in curve], [p["score"] for p in curve]
                axes.plot(x, y, color=colour, lw=1.6, marker="o", ms=4)
            end = max(curve[-1]["seconds"] for curve in curves)
            height = median(curve[-1]["score"] for curve in curves)
            label_ends(axes, end, [(height, label, colour, "bold")], "right")
        axes.set_xlabel("seconds")


def section(record: Line) -> str:
    """Its part of docs/benchmarks.md."""
    s = record["settings"]
    rows = []
    for seed, result in record["seeds"].items():
        cells = [seed]
        for side in ("lorelei", "trl"):
            curve, point = result["curves"][side], result[side]
            cells.append(f"{point['seconds']:.0f} (step {point['step']})" if point else "never")
            cells.append(f"{curve[0]['score']:.2f} to {curve[-1]['score']:.2f}")
        rows.append(f"| {' | '.join(cells)} | {_or_dash(result['times_faster'])} |")
    table = "\n".join(rows)
    return f"""## Time to a score

Seconds from the start of the program to the first evaluation whose score is {s["gain"]} above the
score before training: `lorelei train` beside the GRPOTrainer of {record["peer"]} with peft.
SmolLM2-135M, fp32, LoRA r=16, learns "What is 3 + 4?"; the last number of the reply must be the
sum. Both have the same training prompts in the same order, the same scoring function,
{s["prompts"]} prompts x {s["samples"]} samples of at most {s["new_tokens"]} tokens a step, learning
rate {s["lr"]:g}, {s["steps"]} steps, and evaluate every {s["eval_every"]} steps, greedily, on the
same {s["held_out"]} problems, which never occur in training. Imports, loading and evaluations
count. Which step gets there also depends on what was sampled: the random numbers differ.

![Held-out score over seconds](time_to_score.png)

`make bench ARGS=time_to_score`

| seed | Lorelei, s | score of Lorelei | TRL, s | score of TRL | times faster |
|---|---|---|---|---|---|
{table}
| median | | | | | {_or_dash(record["times_faster"])} |
"""


def _or_dash(value: float | None) -> str:
    return "-" if value is None else str(value)


if __name__ == "__main__":
    main()
