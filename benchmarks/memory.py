"""The memory that `lorelei plan` estimates, beside what `lorelei train` takes.

usage: python -m benchmarks.memory [CASE ...]   (make bench ARGS=memory)
Every case is a run of its own in a folder that is thrown away. `programs` is a run on a model of
almost no size: what it takes is what the processes take, and where the constants of
lorelei/plan/memory.py come from. Writes benchmarks/results/memory.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

from benchmarks.cases import FILLER, MODEL
from benchmarks.turns import Line, begun, keep
from lorelei.model.locate import resolve_model

RUNS = 2
GIB, MIB = 2**30, 2**20
POLL = 0.05  # seconds; a process that ends between two looks is seen up to the first of them

SUMS: dict[str, Any] = {"task": {"kind": "reasoning_gym", "name": "chain_sum"}}
# whose completions reach their full length, as the estimate takes them
STORIES: dict[str, Any] = {
    "task": {"kind": "jsonl", "path": "stories.jsonl"},
    "reward": {"kind": "python", "path": "rewards.py:vowels"},
}
STEP: dict[str, Any] = {
    "model": MODEL,
    "steps": 2,
    "rollout": {"n_samples": 8, "max_new_tokens": 64},
    "algo": {"lr": 2e-4, "batch_size": 2},
    "eval": {"every": 0},
}
CASES: dict[str, dict[str, Any]] = {
    "2x8": STEP | STORIES,
    "2x8-prompt512-checkpointing": STEP
    | {
        "train": {"gradient_checkpointing": True},
        "task": {"kind": "jsonl", "path": "long.jsonl"},
        "reward": {"kind": "math_verify"},
    },
    "3 adapters, 2x16": STEP
    | SUMS
    | {
        "rollout": {"n_samples": 16, "max_new_tokens": 32},
        "eval": {"every": 2, "n_prompts": 8},
        "adapters": {
            "sums": {},
            "products": {"lora": {"lora_rank": 8}, "task": {"name": "products"}},
            "letters": {"lora": {"lora_rank": 32}, "task": {"name": "letter_counting"}},
        },
    },
    "4x8, two steps off-policy": STEP
    | STORIES
    | {
        "steps": 4,
        "rollout": {"n_samples": 8, "max_new_tokens": 64, "max_head_offpolicyness": 2},
        "algo": {"lr": 2e-4, "batch_size": 4},
    },
    "2x8, two workers": STEP | STORIES | {"train": {"workers": 2}},
    "2x8, full fine-tuning": STEP
    | STORIES
    | {"lora": {"use_lora": False}, "algo": {"lr": 1e-5, "batch_size": 2}},
}
REWARDS = """
def one(completion, **row):
    return 1.0

def vowels(completion, **row):
    return sum(map(completion.count, "aeiou")) / (len(completion) + 1)
"""
# enough workers, adapters and rewards to see every kind of process
PROGRAMS = (
    STEP
    | SUMS
    | {
        "model": "./tiny",
        "rollout": {"n_samples": 2, "max_new_tokens": 4},
        "train": {"workers": 2},
        "adapters": {
            "gym": {},
            "math": {"reward": {"kind": "math_verify"}},
            "own": {"reward": {"kind": "python", "path": "rewards.py:one"}},
        },
    }
)


def make_files(folder: Path) -> None:
    """What the cases read: prompts, reward functions and a model of almost no size."""
    rows = [{"question": f"{FILLER * 48}What is {n} + 1?", "answer": str(n + 1)} for n in range(64)]
    (folder / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"question": f"Tell the long story of {n} ships.", "answer": ""} for n in range(2, 66)]
    (folder / "stories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(REWARDS)
    whole, tiny = resolve_model(MODEL), folder / "tiny"
    tiny.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (whole / name).exists():
            (tiny / name).write_bytes((whole / name).read_bytes())
    config = json.loads((whole / "config.json").read_text())
    D = 16
    config |= {"hidden_size": D, "intermediate_size": D, "num_hidden_layers": 1, "head_dim": D}
    config |= {"num_attention_heads": 1, "num_key_value_heads": 1}
    (tiny / "config.json").write_text(json.dumps(config))
    at = "model.layers.0"
    shapes = {f"{at}.self_attn.{n}_proj.weight": (D, D) for n in "qkvo"}
    shapes |= {f"{at}.mlp.{n}_proj.weight": (D, D) for n in ("gate", "up", "down")}
    norms = (f"{at}.input_layernorm", f"{at}.post_attention_layernorm", "model.norm")
    shapes |= {f"{name}.weight": (D,) for name in norms}
    shapes["model.embed_tokens.weight"] = (config["vocab_size"], D)
    drawn = np.random.default_rng(0)
    save_file(
        {n: drawn.standard_normal(s, dtype=np.float32) for n, s in shapes.items()},
        tiny / "model.safetensors",
    )


def peaks(folder: Path, config: Mapping[str, Any]) -> dict[str, list[int]]:
    """Train; {kind of process: peak resident bytes of each}."""
    run = tempfile.mkdtemp(dir=folder)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**config, "runs_dir": run}))
    command = [sys.executable, "-m", "lorelei", "train", str(path)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    others: dict[int, tuple[str, int]] = {}
    while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
        for pid in _children(process.pid):
            if (seen := _look(pid)) is not None:
                others[pid] = seen
        time.sleep(POLL)
    process.returncode = os.waitstatus_to_exitcode(ended[1])
    if process.returncode:
        sys.exit(f"error: {' '.join(command)} ended with {process.returncode}")
    found = {"controller": [ended[2].ru_maxrss * 1024]}
    for kind, peak in others.values():
        found.setdefault(kind, []).append(peak)
    return found


def _children(pid: int) -> list[int]:
    """Of every thread."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += map(int, task.read_text().split())
        except OSError:  # the thread has ended
            continue
    return found


def _look(pid: int) -> tuple[str, int] | None:
    """What kind of process it is, and its peak; none when it has just begun or ended."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    kinds = {
        b"lorelei.reward.worker": "reward worker",
        b"lorelei.train.remote.worker": "train worker",
    }
    kind = next((name for module, name in kinds.items() if module in command), None)
    peak = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    return (kind, int(peak[0]) * 1024) if kind is not None and peak else None


def estimate(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """What `lorelei plan` says."""
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(dict(config)))
    command = [sys.executable, "-m", "lorelei", "plan", str(path), "--json"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def measure(folder: Path, config: Mapping[str, Any]) -> Line:
    """A case: the run's peak, the largest of several runs, and the estimate."""
    planned = estimate(folder, config)
    seconds = time.perf_counter()
    runs = [peaks(folder, config) for _ in range(RUNS)]
    seconds = (time.perf_counter() - seconds) / RUNS
    totals = sorted(sum(map(sum, run.values())) for run in runs)
    phase = max(planned["memory"], key=lambda name: sum(planned["memory"][name].values()))
    return {
        "runs_gib": [round(total / GIB, 3) for total in totals],
        "measured_gib": round(totals[-1] / GIB, 3),
        "estimated_gib": round(planned["total_memory"] / GIB, 3),
        "ratio": round(planned["total_memory"] / totals[-1], 3),
        "phase": phase,
        "parts_gib": {n: round(b / GIB, 3) for n, b in planned["memory"][phase].items()},
        "processes_mib": {n: [round(p / MIB) for p in held] for n, held in runs[-1].items()},
        "seconds": round(seconds),
    }


def programs(folder: Path) -> Line:
    """{kind of process: MiB of each}; reward workers come in the order of the adapters."""
    found = peaks(folder, PROGRAMS)
    return {kind: [round(peak / MIB) for peak in held] for kind, held in found.items()}


def section(record: Line) -> str:
    """The part of docs/benchmarks.md."""
    cases: dict[str, Line] = record["cases"]
    lines = [
        "## Memory, estimated and taken",
        "",
        "The memory that `lorelei plan` estimates from the configuration, beside the resident "
        "memory that `lorelei train` takes: short runs of SmolLM2-135M in fp32, the peaks of all "
        f"their processes added up, the largest of {RUNS} runs. The estimate takes every "
        "completion at its full length; the stories that most of these runs ask for reach it, "
        "answers to long prompts and to sums may not. The second table has the estimate's parts in "
        "the phase that needs most, in GiB.",
        "",
        "`make bench ARGS=memory`",
        "",
        "| run | taken, GiB | estimated, GiB | estimated / taken | most in |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {c['measured_gib']:.2f} | {c['estimated_gib']:.2f} | {c['ratio']:.2f} "
            f"| {c['phase']} |"
            for name, c in cases.items()
        ),
        "",
        f"| part | {' | '.join(cases)} |",
        f"|---|{'---|' * len(cases)}",
    ]
    for part in dict.fromkeys(part for c in cases.values() for part in c["parts_gib"]):
        held = (c["parts_gib"].get(part, 0) for c in cases.values())
        lines.append(f"| {part} | {' | '.join(f'{x:.2f}' if x else '' for x in held)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    some = sys.argv[1:]
    record = {part: begun("memory", some, part) for part in ("programs_mib", "cases")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_files(folder)
        for case in some or ["programs", *CASES]:
            if case == "programs":
                found = record["programs_mib"] = programs(folder)
            else:
                found = record["cases"][case] = measure(folder, CASES[case])
            sys.stdout.write(json.dumps({case: found}, indent=2) + "\n")
            sys.stdout.flush()
            if record["cases"]:
                keep("memory", record)


if __name__ == "__main__":
    main()
