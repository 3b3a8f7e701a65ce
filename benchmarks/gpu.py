"""Lorelei on a CUDA GPU: its contract tests there, and its speed beside transformers and TRL.

usage: python -m benchmarks.gpu [contract] [0.6b] [8b]    about 5 minutes on an H200
       python -m benchmarks.gpu --tiny                     on any device, prints and keeps nothing
Needs a checkout, torch, transformers and peft; nothing is downloaded. Each side runs in a fresh
process. Writes benchmarks/results/gpu.json after each side; cases that were measured on the same
device before stay in it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from xml.etree import ElementTree

import torch

from benchmarks.gpu_cases import CASES, TINY, GpuCase
from benchmarks.gpu_page import section
from benchmarks.peers.environment import peers_python
from benchmarks.turns import Line, keep, kept, run

__all__ = ["main", "section"]

CONTRACT = "contract"
KERNELS = "tests/unit/model/test_flash_attention.py"
SUITES = ("tests/contract", "tests/parity", KERNELS, "tests/unit/inference/test_flash_step.py")
OURS = "not fsdp and not megatron and not vllm and not sglang"  # archon and embedded
NEEDS_A_MODEL = "tests/parity/test_sampler_trainer.py"
TEST_SECONDS = 60
Report = Callable[[Line], None]
TRL_CASES = ("0.6b", "tiny")
PACKAGES = ("transformers", "peft", "trl")


def device() -> Line:
    """What is measured on, and with what."""
    cuda = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "driver": _driver() if cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{package: _version(package) for package in PACKAGES},
    }


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[0].strip()


def _peer() -> str:
    """The peers' own interpreter where it is installed, else this one."""
    return str(peers_python()) if peers_python().exists() else sys.executable


def _version(package: str) -> str | None:
    """None: not installed."""
    if peers_python().exists():
        ask = f"from importlib.metadata import version; print(version({package!r}))"
        return subprocess.check_output([_peer(), "-c", ask], text=True).strip()
    try:
        return version(package) if find_spec(package) else None
    except PackageNotFoundError:
        return None


def contract(suites: Sequence[str]) -> Line:
    """How many tests passed on the device of this machine, and the names of those that did not.

    Of the engines, those of archon and embedded; in several processes where pytest-xdist is.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-p", "no:cacheprovider", "--continue-on-collection-errors", "-k", OURS]
        options += ["-n", "auto"] if find_spec("xdist") else []
        options += [
            f"--timeout={TEST_SECONDS}",
            f"--ignore={NEEDS_A_MODEL}",
            f"--junitxml={report}",
        ]
        command = [sys.executable, "-m", "pytest", *options, *suites]
        subprocess.run(command, stdout=sys.stderr, check=False)
        suite = next(ElementTree.parse(report).iter("testsuite"))
    bad = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    total, skipped = (int(suite.get(key, 0)) for key in ("tests", "skipped"))
    return {
        "suites": list(suites),
        "passed": total - skipped - len(bad),
        "failed": len(bad),
        "skipped": skipped,
        "seconds": round(float(suite.get("time", 0))),
        "failures": bad,
    }


def sides(case: GpuCase) -> dict[str, list[str]]:
    """The program of each side that this machine can run."""
    found = {"lorelei": [sys.executable, "-m", "benchmarks.gpu_ours", case.name]}
    if _version("peft") is not None:
        found["transformers"] = [_peer(), "-m", "benchmarks.peers.gpu_peft", case.name]
    if case.name in TRL_CASES and _version("trl") is not None:
        found["trl"] = [_peer(), "-m", "benchmarks.peers.gpu_trl", case.name]
    return found


def measure(case: GpuCase, report: Report) -> Line:
    """Every side's kinds of work, reported after each side; failed: how a side ended instead."""
    lines: dict[str, dict[str, Line]] = {}
    failed: dict[str, str] = {}
    record: Line = {"model": case.model, "failed": failed, "works": {}}
    for side, command in sides(case).items():
        try:
            found = run(command)
        except subprocess.CalledProcessError as error:  # the others are measured all the same
            failed[side] = f"ended with exit status {error.returncode}"
            continue
        for line in found:
            lines.setdefault(line["work"], {})[side] = line
        record["works"] = {work: _work(case, work, held) for work, held in lines.items()}
        report(record)
    return record


def _work(case: GpuCase, work: str, lines: Mapping[str, Line]) -> Line:
    """Medians of each side, and how many times faster ours is."""
    found = {
        side: _side(case, work, line, lines.get("lorelei", {})) for side, line in lines.items()
    }
    mine = found.get("lorelei")
    for side, theirs in found.items():
        if mine is not None and side != "lorelei":
            theirs["lorelei_times_faster"] = round(theirs["seconds"] / mine["seconds"], 3)
            theirs["lorelei_share_of_memory"] = _ratio(mine["peak_gib"], theirs["peak_gib"])
    return found


def _side(case: GpuCase, work: str, line: Line, ours: Line) -> Line:
    medians = {phase: median(seconds) for phase, seconds in line["seconds"].items()}
    main = {"train": "pass", "step": "step"}.get(work, "all_tokens")
    found = {
        "seconds": medians[main],
        "seconds_range": [min(line["seconds"][main]), max(line["seconds"][main])],
        "tokens_per_s": round(line["tokens"] / medians[main], 1),
        "peak_gib": line["peak_gib"],
    }
    if work == "train":
        found["logprob"] = round(line["logprob"], 4)
        if "products_s" in ours:
            found["products_s"] = round(ours["products_s"], 5)
            found["share_of_products"] = round(ours["products_s"] / medians[main], 3)
    elif work == "step":
        found |= {f"{phase}_s": s for phase, s in medians.items() if phase != main}
    else:
        one = (medians[main] - medians["first_token"]) / (case.new_tokens - 1)
        found["token_ms"] = round(one * 1e3, 3)
        if "weight_bytes" in ours:
            reading = ours["weight_bytes"] / ours["copy_bytes_per_s"]
            found["copy_gb_per_s"] = round(ours["copy_bytes_per_s"] / 1e9)
            found["share_of_bandwidth"] = _ratio(reading, one)
    return found


def _ratio(a: float, b: float) -> float | None:
    return round(a / b, 3) if b > 0 else None


def main(arguments: Sequence[str]) -> None:
    """Raises SystemExit for a case that there is not, or a machine without CUDA."""
    if list(arguments) == ["--tiny"]:
        record = {
            "device": device(),
            CONTRACT: contract([KERNELS]),
            "cases": {TINY.name: measure(TINY, lambda _: None)},
        }
        sys.stdout.write(json.dumps(record, indent=2) + "\n")
        return
    names = list(arguments) or [CONTRACT, *CASES]
    if unknown := [n for n in names if n != CONTRACT and n not in CASES]:
        sys.exit(f"error: there is no case {unknown[0]!r}; use {CONTRACT}, {', '.join(CASES)}")
    if not torch.cuda.is_available():
        sys.exit("error: torch sees no CUDA device here; run it on a GPU machine, or use --tiny")
    record: Line = {"device": device(), "cases": {}}
    if (before := kept("gpu")) is not None and before["device"] == record["device"]:
        record |= {key: before[key] for key in (CONTRACT, "cases") if key in before}
    for name in names:
        if name == CONTRACT:
            record[CONTRACT] = contract(SUITES)
        else:
            record["cases"][name] = measure(CASES[name], partial(_keep_case, record, name))
        keep("gpu", record)


def _keep_case(record: Line, name: str, case: Line) -> None:
    """A machine that is lent by the minute may end in the middle."""
    record["cases"][name] = case
    keep("gpu", record)


if __name__ == "__main__":
    main(sys.argv[1:])
