"""What is installed on this machine, what can run here, and how to fix what is missing."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lorelei.cache import cache_folder
from lorelei.inference.kinds import INFERENCE, SERVERS
from lorelei.process import physical_cores
from lorelei.train.kinds import TRAIN
from lorelei.venvs.recipe import KINDS, PACKAGE, command, packages, recipe

_SMOLLM2 = "HuggingFaceTB--SmolLM2-135M-Instruct"


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """Something Lorelei uses."""

    name: str
    found: str | None  # version or words; None: it is not here
    fix: str = ""  # what to do where it is missing, or what works without it


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """A train engine with a rollout engine, and the publishers between them."""

    train: str
    rollout: str
    publishers: tuple[str, ...]
    fix: str = ""  # what to do first; empty: it runs

    @property
    def runs(self) -> bool:
        return not self.fix


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What was found on this machine."""

    parts: tuple[Component, ...]
    combinations: tuple[Combination, ...]


def diagnose() -> Diagnosis:
    """Look at this machine. Compiles the decoder's kernels where that has not been done."""
    return Diagnosis(parts=tuple(_parts()), combinations=tuple(_combinations()))


def doctor_table(found: Diagnosis) -> Group:
    """Tables of what is installed, what can run and what is missing."""
    installed = [(part.name, part.found) for part in found.parts if part.found is not None]
    missing = [(part.name, part.fix) for part in found.parts if part.found is None]
    tables = [_words("installed", "", installed), _runs(found.combinations)]
    if missing:
        tables.append(_words("missing", "what to do", missing))
    return Group(*tables)


def _words(what: str, then: str, rows: Sequence[tuple[str, str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(what, no_wrap=True)
    table.add_column(then, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _runs(combinations: Sequence[Combination]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("train", "rollout", "publish"):
        table.add_column(column, no_wrap=column != "publish")
    table.add_column("runs here")
    for c in combinations:
        words = (c.train, c.rollout, " ".join(c.publishers))
        verdict = Text("yes", style="green") if c.runs else Text(f"no: {c.fix}", style="yellow")
        table.add_row(*map(Text, words), verdict)
    return table


def _parts() -> Iterator[Component]:
    import torch

    from lorelei.model.kernels.build import compiler_command

    yield Component(name="lorelei", found=version("lorelei"))
    yield Component(name="python", found=platform.python_version())
    yield Component(name="torch", found=torch.__version__)
    yield Component(name="device", found=_device())
    command = compiler_command()
    compiler = " ".join(command) if command else None
    fix = "a C compiler (`apt install gcc`) makes training on a CPU faster"
    yield Component(name="C compiler", found=compiler, fix=fix)
    yield _kernels()
    for kind in KINDS:
        yield _environment(kind)
    yield _package("ray", "`pip install 'lorelei[ray]'`, for cluster: {kind: ray}")
    model = cache_folder() / "models" / _SMOLLM2
    there = os.path.isfile(model / "config.json")  # of a folder that may not be read: False
    yield Component(name="SmolLM2-135M", found=_short(model) if there else None, fix="make model")


def _device() -> str:
    import torch

    from lorelei.model.backend import default_device

    device = default_device()
    if device.type == "cuda":
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return f"{len(names)} x {names[0]}"
    return f"{device.type}, {physical_cores()} cores of {os.cpu_count()}"


def _short(path: Path) -> str:
    """With ~ for the home folder."""
    home = os.path.expanduser("~")  # itself where there is none
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


def _kernels() -> Component:
    from lorelei.model.kernels.build import library

    found = "compiled for this processor" if library() is not None else None
    fix = "without a C compiler and torch's OpenMP, torch's own operations are used"
    return Component(name="kernels", found=found, fix=fix)


def _environment(kind: str) -> Component:
    """A virtual environment of an engine."""
    listed = packages(kind)
    if listed is None:
        return Component(name=kind, found=None, fix=command(kind))
    made = recipe(kind)
    number, torch = listed[PACKAGE[kind]], listed["torch"]
    found = f"{number} ({made.build}) with torch {torch}, in {made.folder.name}"
    return Component(name=kind, found=found)


def _package(name: str, without: str) -> Component:
    """A package of Lorelei's own environment."""
    try:
        return Component(name=name, found=version(name))
    except PackageNotFoundError:
        return Component(name=name, found=None, fix=without)


def _combinations() -> Iterator[Combination]:
    for train in TRAIN:
        for rollout, kind in INFERENCE.items():
            yield Combination(
                train=train,
                rollout=rollout,
                publishers=kind.publishers,
                fix=_obstacle(train) or _obstacle(rollout),
            )


def _obstacle(engine: str) -> str:
    """What keeps an engine from running here; empty: nothing."""
    if engine not in KINDS:
        return ""
    if engine in SERVERS and recipe(engine).build == "cpu" and "avx2" not in _cpu_flags():
        return "a processor with AVX2, or an NVIDIA GPU"
    return "" if packages(engine) is not None else command(engine)


def _cpu_flags() -> list[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split() for line in lines if line.startswith("flags")), list[str]())
