"""Runs programs that print JSON lines, in fresh processes, and keeps what they measured."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from benchmarks.peers.environment import RECIPE
from lorelei.process import physical_cores

RESULTS = Path("benchmarks/results")

Line = dict[str, Any]


def run(command: list[str], **settings: str) -> list[Line]:
    """The JSON lines that a program prints, run with these environment variables."""
    threads = {"OMP_NUM_THREADS": str(physical_cores()), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, env={**os.environ, **threads, **settings}, stdout=subprocess.PIPE, check=True
    )
    return [json.loads(line) for line in done.stdout.decode().splitlines() if line[:2] == '{"']


def pinned(peer: str) -> str:
    """A peer with the version that its environment has, such as 'trl 1.16.0'."""
    (line,) = (w for w in RECIPE.read_text().split() if w.startswith(f"{peer}=="))
    return line.replace("==", " ")


def keep(name: str, content: Line) -> None:
    """Write benchmarks/results/<name>.json, with the machine it was measured on."""
    record = {"machine": machine(), **content}
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")


def kept(name: str) -> Line | None:
    """What `keep` wrote; none when the benchmark has not run."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else None


def begun(name: str, some: list[str], part: str = "cases") -> Line:
    """What a run of `some` of its cases adds to: what was kept of this machine before.

    A run of all of them (none named) begins anew.
    """
    record = kept(name)
    if not some or record is None or _same(record) != _same({"machine": machine()}):
        return {}
    return record[part]


def _same(record: Line) -> Line:
    return {key: value for key, value in record["machine"].items() if key != "load"}
