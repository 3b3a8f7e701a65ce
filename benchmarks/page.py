"""docs/benchmarks.md, made from the JSON in benchmarks/results and from nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from benchmarks.goals import goals_table
from benchmarks.turns import Line, kept

PAGE = Path("docs/benchmarks.md")
# in the order of the page
BENCHMARKS = (
    "grpo_step",
    "time_to_score",
    "generation",
    "forward_backward",
    "prefix_sharing",
    "memory",
    "full_finetuning",
    "gpu",
)


def page() -> str:
    """The whole page; a benchmark that has not run is left out."""
    found = {name: kept(name) for name in BENCHMARKS}
    records = {name: record for name, record in found.items() if record is not None}
    sections = [import_module(f"benchmarks.{n}").section(r).strip() for n, r in records.items()]
    return "\n\n".join((_opening(records), *sections)) + "\n"


def _opening(records: Mapping[str, Line]) -> str:
    return f"""# Benchmarks

Every number of this page comes from a file of [benchmarks/results](../benchmarks/results), and
`make page` writes the page from them. `make bench` runs everything but the GPU benchmark again,
`make bench ARGS=NAME` one of them. Sides that are compared are measured in turns in one run, with
one thread a physical core, and ratios are of that run only.

{_machines(records)}

## Goals

{goals_table(records)}"""


def _machines(records: Mapping[str, Line]) -> str:
    """What was measured where."""
    by: dict[str, list[str]] = {}
    for name, record in records.items():
        m = record["machine"]
        where = f"{m['cores']} cores of {m['cpu']}, Python {m['python']}, torch {m['torch']}"
        by.setdefault(where, []).append(name)
    return "\n".join(f"- {', '.join(names)}: {where}" for where, names in by.items())
