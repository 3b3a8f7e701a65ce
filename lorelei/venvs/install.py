"""Makes an environment by its recipe; an unfinished one is never used. 5 minutes, 3.5 GB each.

The CUDA recipes are the upstream releases of the versions that run on a CPU here; they have not
been run.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

from lorelei.venvs.recipe import Recipe, recipe

_METADATA = "Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: {target}\n"


def install(kind: str) -> Path:
    """The interpreter; made first where it is not there, or where an earlier try broke off.

    Waits for another process that makes the same one. Raises ValueError when a step fails.
    """
    wanted = recipe(kind)
    wanted.folder.parent.mkdir(parents=True, exist_ok=True)
    # flock: the system frees it however this process ends
    with wanted.folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.set_inheritable(lock.fileno(), True)  # a pip that outlives this process keeps the lock
        if not wanted.marker.is_file():
            _make(wanted)
    return wanted.python


def _make(wanted: Recipe) -> None:
    _say(f"installing {wanted.kind} ({wanted.build}) into {wanted.folder}")
    _run([sys.executable, "-m", "venv", "--clear", str(wanted.folder)], wanted)
    _pins(wanted).write_text(wanted.lock)
    for step in wanted.steps:
        _say(f"  {' '.join(step)}"[:100])
        _do(step, wanted)
    listed = _run([*_pip(wanted), "list", "--format", "json"], wanted)
    versions = {package["name"]: package["version"] for package in json.loads(listed)}
    unfinished = wanted.marker.with_suffix(".tmp")
    unfinished.write_text(json.dumps(versions, indent=1))
    unfinished.replace(wanted.marker)


def _do(step: list[str], wanted: Recipe) -> None:
    match step:
        case ["pip", "install", *arguments]:
            pins = ["--constraint", str(_pins(wanted))]
            _run([*_pip(wanted), "install", "-q", *pins, *arguments], wanted)
        case ["pip", *arguments]:
            _run([*_pip(wanted), *arguments, "-q"], wanted)
        case ["alias", package, target]:
            _alias(package, target, wanted)
        case ["import", module]:
            _run([str(wanted.python), "-c", f"import {module}"], wanted)
        case _:
            raise AssertionError(f"{wanted.kind}: {step} is not a step of a recipe")


def _pip(wanted: Recipe) -> list[str]:
    return [str(wanted.python), "-m", "pip", "--disable-pip-version-check"]


def _pins(wanted: Recipe) -> Path:
    return wanted.folder / "lock.txt"


def _alias(package: str, target: str, wanted: Recipe) -> None:
    name, _, version = package.partition("==")
    [site] = (wanted.folder / "lib").glob("python*/site-packages")
    folder = site / f"{name}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(_METADATA.format(name=name, version=version, target=target))
    (folder / "RECORD").write_text("")


def _run(command: list[str], wanted: Recipe) -> str:
    # PYTHONPATH: the environment must not see the packages of the one that makes it
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, env=settings, capture_output=True, text=True, check=False, close_fds=False
    )
    if done.returncode != 0:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-20:])
        raise ValueError(f"{wanted.kind}: `{' '.join(command)}` failed; {said}")
    return done.stdout


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201
