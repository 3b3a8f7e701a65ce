"""One runner for the acceptance matrices. Run it from the repository root.

usage: python -m acceptance                       all of them
       python -m acceptance MATRIX [CASE ...]     one
       python -m acceptance on ENGINE [SIZE]      what concerns one engine
       python -m acceptance page                  write docs/acceptance.md from acceptance/results
A case whose result says that something does not hold fails the command; it is kept all the same.
Cases of one engine and size share a process and a server, whichever matrix they belong to.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from importlib import import_module
from typing import Any

from acceptance.page import MATRICES, PAGE, page
from acceptance.record import keep
from acceptance.stage import Case, staged
from lorelei.venvs.recipe import KINDS, interpreter

Job = tuple[str, str]  # matrix and case


def main(arguments: list[str]) -> None:
    match arguments:
        case ["page"]:
            PAGE.write_text(page())
        case ["measure", *names]:  # what `_run` starts
            asyncio.run(_measure([_job(name) for name in names]))
        case []:
            _run_all(_jobs())
        case ["on", engine]:
            _run_all([job for job in _jobs() if _engine(_case(job)) == engine])
        case ["on", engine, size]:
            _run_all([job for job in _jobs() if _stage(_case(job)) == (engine, size)])
        case [matrix, *cases] if matrix in MATRICES:
            _run_all([(matrix, case) for case in cases or _cases(matrix)])
        case [other, *_]:
            sys.exit(f"error: there is no matrix {other!r}; use {', '.join(MATRICES)} or page")


def _cases(matrix: str) -> dict[str, Any]:
    return import_module(f"acceptance.{matrix}").CASES


def _jobs() -> list[Job]:
    return [(matrix, case) for matrix in MATRICES for case in _cases(matrix)]


def _job(name: str) -> Job:
    matrix, _, case = name.partition("/")
    return matrix, case


def _case(job: Job) -> Any:
    matrix, name = job
    if name not in _cases(matrix):
        sys.exit(f"error: {matrix} has no case {name!r}; use {', '.join(_cases(matrix))}")
    return _cases(matrix)[name]


def _stage(case: Any) -> tuple[str, str] | None:
    """Engine and size: cases that share them share a server. Runs start servers of their own."""
    return (case.engine, case.size) if isinstance(case, Case) else None


def _engine(case: Any) -> str | None:
    """The rollout engine that a case samples with, or none."""
    return getattr(case, "engine", None)


def _run_all(jobs: Sequence[Job]) -> None:
    """Measure and keep; a process for each stage, and for each job that has none."""
    if not jobs:
        sys.exit("error: there is no such case")
    groups: dict[object, list[Job]] = {}
    for job in jobs:
        groups.setdefault(_stage(_case(job)) or job, []).append(job)
    held = [job for group in groups.values() for job in _run(group)]
    if failed := [f"{matrix} {case}" for matrix, case in jobs if (matrix, case) not in held]:
        sys.exit(f"error: failed: {', '.join(failed)}")


def _run(jobs: Sequence[Job]) -> list[Job]:
    """Those that hold."""
    kind = _engine(_case(jobs[0]))
    if kind in KINDS:
        try:
            interpreter(kind)
        except ValueError as error:
            sys.exit(f"error: {error}")
    names = [f"{matrix}/{case}" for matrix, case in jobs]
    _say(" ".join(names))
    held: list[Job] = []
    command = [sys.executable, "-m", "acceptance", "measure", *names]
    heap = {"MALLOC_ARENA_MAX": "1", **os.environ}  # as the command line sets it
    with subprocess.Popen(command, env=heap, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if not line.startswith("{"):
                continue
            found = json.loads(line)
            matrix, case = job = _job(found["job"])
            keep(matrix, case, found["result"])
            for problem in found["result"]["problems"]:
                _say(f"  {found['job']} does not hold: {problem}")
            if not found["result"]["problems"]:
                held.append(job)
    return held


async def _measure(jobs: Sequence[Job]) -> None:
    """One line of JSON for each."""
    place = _stage(_case(jobs[0]))
    async with AsyncExitStack() as stack:
        stage = await stack.enter_async_context(staged(*place)) if place else None
        for matrix, name in jobs:
            case = _case((matrix, name))
            module = import_module(f"acceptance.{matrix}")
            if stage is None:
                result = await module.measure(case)
            else:
                async with stage.through(case.publisher):
                    result = await module.measure(case, stage)
            print(json.dumps({"job": f"{matrix}/{name}", "result": result}), flush=True)  # noqa: T201


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
