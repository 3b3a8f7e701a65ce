"""Inputs from public bug reports, each a folder whose README says what is right.

A case's run.sh works in a copy of its folder and prints one line PASS or FAIL last.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CASES = sorted(path.parent.name for path in HERE.glob("*/run.sh"))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]


@pytest.mark.parametrize("case", CASES)
def test_the_case_is_right(case: str) -> None:
    programs = {"PY": sys.executable, "L": str(Path(sys.executable).with_name("lorelei"))}
    done = subprocess.run(
        ["sh", str(HERE / case / "run.sh")],
        env={**os.environ, **programs},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=400,
    )
    verdicts = [line for line in done.stdout.splitlines() if line.startswith(("PASS", "FAIL"))]
    assert verdicts and verdicts[-1].startswith("PASS"), done.stdout[-3000:]
