"""Every layout of Megatron: a run killed in the middle of a step and resumed, and one left alone.

usage: python -m acceptance killed [CASE ...]
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from acceptance.megatron import CASES as LAYOUTS
from acceptance.megatron import Case
from acceptance.record import Line
from acceptance.table import table
from benchmarks.cases import MODEL
from lorelei.cli.trained_run import TrainedRun
from lorelei.inference.server.process_guard import descendants
from lorelei.lora.targets import FUSED
from lorelei.model.locate import resolve_model
from lorelei.model.tokenizer import load_tokenizer
from lorelei.obs.history import read_metrics
from lorelei.store.check import check_run
from lorelei.store.manifest import manifest_paths
from tests.contract.train_engines import MEGATRON
from tests.processes import wait_gone
from tests.tiny_models import make_tiny
from tests.tiny_runs import REWARD, final, start, write_rows, write_run

STEPS, KILLED_AFTER = 5, 2
WITHIN = 0.5  # of what a step costs the train workers
DEADLINE = 300.0  # seconds for any command
TICKS = os.sysconf("SC_CLK_TCK")

CASES = {name: case for name, case in LAYOUTS.items() if case.family != "qwen2"}


async def measure(case: Case) -> Line:
    """One row."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        _write(case, place)
        _finish(start(place, "train", "left.yaml"))
        into = _kill(start(place, "train", "killed.yaml"), place / "runs/killed")
        _finish(start(place, "resume", "killed"))
        row = _compared(place / "runs/left", place / "runs/killed") | {"into_step": round(into, 2)}
    return {**row, "problems": problems(row)}


def _compared(left: Path, killed: Path) -> Line:
    one, other = (TrainedRun.read(folder).state("default").tensors for folder in (left, killed))
    (steps,) = read_metrics(killed / "metrics.jsonl").steps.values()
    return {
        "steps": [step.step for step in steps],
        "tensors": len(one),
        "moved": sum(t.any().item() for name, t in one.items() if "lora_B" in name),
        # a snapshot's name holds the sha256 of the adapter and of Adam's moments
        "same_bits": final(left) == final(killed),
        "distance": max(float((other[n] - t).norm() / t.norm()) for n, t in one.items() if t.any()),
        "check": check_run(killed),
    }


def problems(row: Line) -> list[str]:
    """What does not hold in a row."""
    found = [f"lorelei check: {line}" for line in row["check"]]
    if row["steps"] != list(range(1, STEPS + 1)):
        found.append(f"the resumed run has the steps {row['steps']}")
    if not row["same_bits"]:
        found.append(f"the adapter ends {row['distance']:.1e} away from that of the other run")
    if row["moved"] * 2 != row["tensors"]:
        found.append(f"{row['moved']} of {row['tensors'] // 2} B were trained")
    return found


def _kill(run: subprocess.Popen[str], folder: Path) -> float:
    """SIGKILL to all processes of a run within a step. Returns which share of its work was done."""
    used: dict[int, float] = {}  # CPU seconds of its train workers, by the steps committed
    workers: Sequence[int] = ()
    deadline = time.monotonic() + DEADLINE
    try:
        while True:
            assert run.poll() is None and time.monotonic() < deadline, _output(run)
            if (done := _committed(folder)) >= 0:
                workers = workers or _train_workers(run.pid)
                now = sum(map(_cpu_seconds, workers))
                used.setdefault(done, now)
                if done >= KILLED_AFTER:
                    step = used[KILLED_AFTER] - used[KILLED_AFTER - 1]
                    if now - used[KILLED_AFTER] >= WITHIN * step:
                        break
            time.sleep(0.002)
        everything = [run.pid, *descendants(run.pid)]
        for pid in everything:
            os.kill(pid, signal.SIGKILL)
    finally:
        run.kill()
        run.communicate()
    assert wait_gone(everything), "the killed run has left processes"
    assert _committed(folder) == KILLED_AFTER, "the step was over before its processes were killed"
    return (now - used[KILLED_AFTER]) / step


def _committed(folder: Path) -> int:
    return max([int(path.stem) for path in manifest_paths(folder)], default=-1)


def _train_workers(pid: int) -> list[int]:
    below = [(p, Path(f"/proc/{p}/cmdline").read_bytes()) for p in descendants(pid)]
    return [p for p, command in below if b"lorelei.train.remote.worker" in command]


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def _finish(run: subprocess.Popen[str]) -> None:
    out, said = run.communicate(timeout=DEADLINE)
    assert run.returncode == 0, f"exit status {run.returncode}\n{out}\n{said}"


def _output(run: subprocess.Popen[str]) -> str:
    run.kill()
    out, said = run.communicate()
    return f"the run did not come to step {KILLED_AFTER + 1}:\n{out}\n{said}"


def _write(case: Case, place: Path) -> None:
    tokenizer = load_tokenizer(resolve_model(MODEL))
    tokenizer.save_pretrained(make_tiny(case.family, place / "model", vocab_size=len(tokenizer)))
    (place / "rewards.py").write_text(REWARD)
    write_rows(place)
    for name in ("left", "killed"):
        write_run(
            place,
            name,
            steps=STEPS,
            train=_train(case.layout),
            lora={"target_modules": list(FUSED)},
            rollout={"max_new_tokens": 24},
            eval={"every": 0},
        )


def _train(layout: str) -> dict[str, Any]:
    """The section of a run with this layout."""
    options = dict(MEGATRON[layout])
    copies = options.pop("workers")
    for name in ("tensor_parallel", "pipeline_parallel", "context_parallel"):
        copies //= options.get(name, 1)
    return {"kind": "megatron", "data_parallel": copies, "max_tokens_per_mb": 128, **options}


def section(found: Mapping[str, Line]) -> str:
    """Its part of docs/acceptance.md."""
    rows = [
        (
            CASES[name].family,
            MEGATRON[CASES[name].layout]["workers"],
            CASES[name].layout.removeprefix("megatron").removeprefix("-") or "one process",
            f"{100 * row['into_step']:.0f}%",
            f"{len(row['steps'])} of {STEPS}",
            "the same bits" if row["same_bits"] else f"{row['distance']:.1e} away",
        )
        for name, row in found.items()
    ]
    columns = ("family", "processes", "layout", "killed at", "steps", "adapter and moments")
    return f"""## Megatron killed and resumed

{STEPS} synchronous steps of `lorelei train` on a tiny model, rank 4 on the fused layers (and in
every expert), sampled by `embedded`. After the commit of step {KILLED_AFTER} all processes get
SIGKILL, when the train workers have done the given share of the work of the next step; then
`lorelei resume`. The last column compares the final snapshot, adapter and Adam's moments, with that
of a run left alone.

`make acceptance ARGS=killed`

{table(columns, rows)}
"""
