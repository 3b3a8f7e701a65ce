"""One runner for the acceptance matrices. Run it from the repository root.

usage: python -m acceptance                       all of them in turn
       python -m acceptance MATRIX [CASE ...]     one
       python -m acceptance page                  write docs/acceptance.md from acceptance/results
A case whose result says that something does not hold fails the command; it is kept all the same.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from importlib import import_module

from acceptance.page import MATRICES, PAGE, page
from acceptance.record import keep
from lorelei.interpreters.recipe import KINDS, interpreter


def main(arguments: list[str]) -> None:
    match arguments:
        case ["page"]:
            PAGE.write_text(page())
        case ["measure", matrix, case]:  # what `_run` starts
            module = import_module(f"acceptance.{matrix}")
            result = asyncio.run(module.measure(module.CASES[case]))
            print(json.dumps(result))  # noqa: T201
        case []:
            _end([failed for matrix in MATRICES for failed in _matrix(matrix, [])])
        case [matrix, *cases] if matrix in MATRICES:
            _end(_matrix(matrix, cases))
        case [other, *_]:
            sys.exit(f"error: there is no matrix {other!r}; use {', '.join(MATRICES)} or page")


def _matrix(matrix: str, names: list[str]) -> list[str]:
    """Measure and keep its cases. Returns those that failed."""
    known = import_module(f"acceptance.{matrix}").CASES
    for name in names:
        if name not in known:
            sys.exit(f"error: {matrix} has no case {name!r}; use {', '.join(known)}")
    return [f"{matrix} {name}" for name in names or known if not _run(matrix, name)]


def _run(matrix: str, case: str) -> bool:
    """A process for each: what one leaves in memory is not another's."""
    kind = case.partition("-")[0]
    if kind in KINDS:
        try:
            interpreter(kind)
        except ValueError as error:
            sys.exit(f"error: {error}")
    _say(f"{matrix} {case}")
    command = [sys.executable, "-m", "acceptance", "measure", matrix, case]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        return False
    result = json.loads(done.stdout.splitlines()[-1])
    keep(matrix, case, result)
    for problem in result["problems"]:
        _say(f"  does not hold: {problem}")
    return not result["problems"]


def _end(failed: list[str]) -> None:
    if failed:
        sys.exit(f"error: failed: {', '.join(failed)}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
