"""Imports point one way, and what is heavy is loaded late."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import lorelei

ROOT = Path(lorelei.__file__).parent
LAYERS = (
    (
        "types",
        "config",
        "algo",
        "user_file",
        "process",
        "process_guard",
        "cache",
    ),  # an algorithm brings its settings
    (
        *("areal", "run_file", "data", "env", "reward", "lora", "model", "parallel"),
        *("store", "obs", "venvs"),
    ),
    ("train", "inference", "rollout", "publish"),
    ("jobs",),
    ("loop",),
    ("plan", "launch"),
    ("serve", "cli", "__main__"),
)
LAYER = {package: number for number, packages in enumerate(LAYERS) for package in packages}
HEAVY = ("torch", "transformers", "vllm", "sglang", "ray", "peft", "datasets", "reasoning_gym")


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(ROOT.rglob("*.py")):
        relative = path.relative_to(ROOT)
        if relative.parts != ("__init__.py",):
            yield relative.as_posix().removesuffix(".py"), ast.parse(path.read_text())


def imported(tree: ast.Module) -> Iterator[str]:
    """Modules of Lorelei that a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            # `from lorelei import loop` names a module, `from lorelei.loop import run` is in one
            whole = node.module == "lorelei"
            names = [f"lorelei.{a.name}" if whole else str(node.module) for a in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.startswith("lorelei."))


def test_every_module_belongs_to_a_layer():
    assert {name.split("/")[0] for name, _ in modules()} <= LAYER.keys()


def test_imports_point_one_way():
    wrong = [
        f"{name} imports {target}"
        for name, tree in modules()
        for target in imported(tree)
        if LAYER[target.split(".")[1]] > LAYER[name.split("/")[0]]
    ]
    assert wrong == []


def test_train_and_inference_never_import_each_other():
    apart = {"train": "inference", "inference": "train"}
    wrong = [
        f"{name} imports {target}"
        for name, tree in modules()
        for target in imported(tree)
        if apart.get(name.split("/")[0]) == target.split(".")[1]
    ]
    assert wrong == []


def test_below_the_configuration_stand_only_types_and_the_algorithms_settings():
    settings = ("config.section", "config.errors", "config.optimizer")
    below = {
        "types": ("nothing",),
        "config": ("config", "types", "algo"),
        "algo": ("algo", "types", "user_file", *settings),
    }
    wrong = [
        f"{name} imports {target}"
        for name, tree in modules()
        for target in imported(tree)
        for allowed in [below.get(name.split("/")[0])]
        if allowed and not f"{target}.".startswith(tuple(f"lorelei.{a}." for a in allowed))
    ]
    assert wrong == []


def loaded_by(*command: str) -> list[str]:
    """The heavy packages that a Python process loads."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command], capture_output=True, text=True, check=True
    )
    roots = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "lorelei" in roots
    return sorted(roots.intersection(HEAVY))


def test_importing_lorelei_loads_nothing_heavy():
    assert (
        loaded_by("-c", "import lorelei, lorelei.types, lorelei.run_file, lorelei.cli.main") == []
    )


def test_help_loads_nothing_heavy():
    assert loaded_by("-m", "lorelei", "--help") == []
    assert loaded_by("-m", "lorelei", "train", "--help") == []


def test_a_command_that_reads_a_run_loads_no_torch(tmp_path):
    (tmp_path / "runs").mkdir()
    assert loaded_by("-m", "lorelei", "runs", str(tmp_path / "runs")) == []
