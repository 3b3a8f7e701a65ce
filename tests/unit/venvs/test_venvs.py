"""Environments of engines: found by their recipe, made whole or not usable."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path

import pytest

from lorelei.venvs import install as installing
from lorelei.venvs import recipe as recipes
from lorelei.venvs.install import install
from lorelei.venvs.recipe import KINDS, Recipe, import_path, interpreter, packages, recipe

SMALL = Recipe(kind="vllm", build="cpu", text="alias thing==1.5+cpu other==1.5\nimport json\n")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LORELEI_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def small(monkeypatch) -> Recipe:
    """A recipe that takes no download, in place of vLLM's."""
    for module in (recipes, installing):
        monkeypatch.setattr(module, "recipe", lambda kind: SMALL)
    return SMALL


def test_what_is_missing_is_said_with_the_command_that_installs_it():
    with pytest.raises(ValueError, match=r"vllm is not installed in .*; run `make vllm`"):
        interpreter("vllm")
    assert packages("vllm") is None


def test_an_unknown_environment_is_refused():
    with pytest.raises(ValueError, match="'sgl' is not known; allowed: vllm, sglang, megatron"):
        interpreter("sgl")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("build", ["", "-cuda"])
def test_every_recipe_pins_what_it_is_for_and_is_made_of_known_steps(kind, build):
    text = (resources.files("lorelei.venvs") / f"{kind}{build}.txt").read_text()
    steps = Recipe(kind=kind, build="cpu", text=text).steps
    assert {step[0] for step in steps} <= {"pip", "alias", "import"}
    version = {"vllm": "0.32.0", "sglang": "0.5.23", "megatron": "0.19.2"}[kind]
    assert any(word.endswith(f"=={version}") for step in steps for word in step)


@pytest.mark.parametrize("kind", KINDS)
def test_the_recipe_for_a_cpu_pins_everything_and_agrees_with_its_lock(kind):
    folder = resources.files("lorelei.venvs")
    lock = (folder / f"{kind}.lock.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lock)
    locked = dict(line.lower().replace("_", "-").split("==") for line in lock)
    steps = Recipe(kind=kind, build="cpu", text=(folder / f"{kind}.txt").read_text()).steps
    asked = [word for step in steps if step[0] == "pip" for word in step if "==" in word]
    for name, version in (word.split("==") for word in asked):
        assert locked[name.lower().replace("_", "-")] == version


def test_another_recipe_or_lock_is_another_folder():
    other = Recipe(kind="vllm", build="cpu", text=SMALL.text + "import sys\n")
    locked = Recipe(kind="vllm", build="cpu", text=SMALL.text, lock="numpy==2.4.6\n")
    assert len({recipe.folder for recipe in (SMALL, other, locked)}) == 3


def test_what_broke_off_is_made_again_once_by_two_at_once_and_then_found(small, capfd):
    small.folder.mkdir(parents=True)
    (small.folder / "left over").touch()
    with pytest.raises(ValueError, match="not installed"):
        interpreter("vllm")
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(install, ["vllm", "vllm"])
    assert first == second == interpreter("vllm") == small.python
    assert capfd.readouterr().err.count("installing vllm") == 1
    assert not (small.folder / "left over").exists()
    look = "import importlib.metadata as m; print(m.version('thing'))"
    said = subprocess.run([first, "-c", look], capture_output=True, text=True, check=True)
    assert said.stdout == "1.5+cpu\n"
    listed = packages("vllm")
    assert listed is not None and listed["thing"] == "1.5+cpu"
    (small.folder / "still here").touch()
    install("vllm")
    assert (small.folder / "still here").exists()


@pytest.mark.slow
def test_a_step_that_fails_leaves_nothing_usable(monkeypatch):
    broken = Recipe(kind="vllm", build="cpu", text="import nothing_of_this_name\n")
    for module in (recipes, installing):
        monkeypatch.setattr(module, "recipe", lambda kind: broken)
    with pytest.raises(ValueError, match="No module named 'nothing_of_this_name'"):
        install("vllm")
    assert packages("vllm") is None


def test_the_command_needs_nothing_but_python(cache, tmp_path):
    """It runs before anything is installed; -S -I: no site-packages."""
    folder = recipe("vllm").folder
    folder.mkdir(parents=True)
    (folder / "installed.json").write_text(json.dumps({"vllm": "0"}))
    code = (
        "import sys, runpy; sys.path.insert(0, '.'); "
        "runpy.run_module('lorelei.venvs', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-I", "-c", code, "vllm"],
        capture_output=True,
        text=True,
        env={**os.environ},
        check=True,
    )
    assert done.stdout.strip() == str(folder / "bin" / "python")


def test_the_import_path_holds_lorelei_alone(tmp_path):
    for _ in range(2):
        folder = import_path()
    assert [child.name for child in folder.iterdir()] == ["lorelei"]
    code = "import lorelei.venvs.recipe as r; print(r.__file__)"
    settings = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=tmp_path,
        env=settings,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()).is_relative_to(folder)
