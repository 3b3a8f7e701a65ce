"""What the matrices measured: one JSON file each, with the machine, its versions and the cases."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from lorelei.venvs.recipe import KINDS, PACKAGE, packages

RESULTS = Path("acceptance/results")

Line = dict[str, Any]


def keep(matrix: str, case: str, line: Line) -> None:
    """Put a case's result in the place of an earlier one; the other cases stay."""
    measured = {"day": time.strftime("%Y-%m-%d"), "machine": machine(), "versions": _versions()}
    cases = kept(matrix) | {case: {**line, **measured}}
    file = RESULTS / f"{matrix}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"cases": cases}, indent=1) + "\n")


def kept(matrix: str) -> dict[str, Line]:
    """The results by case, empty when none was measured."""
    file = RESULTS / f"{matrix}.json"
    return json.loads(file.read_text())["cases"] if file.exists() else {}


def _versions() -> dict[str, str]:
    found = {kind: packages(kind) for kind in KINDS}
    return {kind: listed[PACKAGE[kind]] for kind, listed in found.items() if listed is not None}
