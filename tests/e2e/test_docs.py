"""The code in docs/environments.md and docs/extend, run as it stands there."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml
from transformers import PreTrainedTokenizerFast

from lorelei.launch import local
from lorelei.run_file import load_config
from tests.tiny_models import make_tiny
from tests.tiny_runs import lorelei, make_workplace, records, write_run

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
FOUND = BLOCK.findall((DOCS / "environments.md").read_text())
SECTIONS = [yaml.safe_load(code)["env"] for language, code in FOUND if language == "yaml"]


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A workplace with the page's files, each under the name in its first line."""
    folder = make_workplace(tmp_path_factory.mktemp("docs"), tiny_tokenizer)
    make_tiny("llama", folder / "model", max_position_embeddings=4096)
    for language, code in FOUND:
        if language == "python":
            (folder / code.splitlines()[0].removeprefix("# ")).write_text(code)
    for file in (DOCS / "extend").glob("example_*.py"):
        shutil.copy(file, folder)
    return folder


def test_the_page_has_an_example_of_every_kind() -> None:
    assert [section["kind"] for section in SECTIONS] == ["multi_turn", "tools", "python", "agent"]


@pytest.mark.parametrize("env", SECTIONS, ids=[section["kind"] for section in SECTIONS])
def test_every_example_trains(place: Path, env: dict) -> None:
    sections = {"reward": {"kind": "env"}} if env["kind"] in ("python", "agent") else {}
    name = f"docs-{env['kind']}"
    path = write_run(place, name, runs_dir=str(place / "runs"), steps=1, env=env, **sections)
    local.train(load_config(path))
    (record,) = records(place / "runs" / name, "step")
    assert record["failed_rollouts"] == 0 and record["turns_mean"] >= 1


def blocks(subject: str, language: str) -> list[str]:
    """The code of a page of docs/extend."""
    page = (DOCS / "extend" / f"{subject}.md").read_text()
    return [code for found, code in BLOCK.findall(page) if found == language]


@pytest.mark.parametrize("subject", ["algorithm", "reward", "environment"])
def test_what_a_page_explains_stands_in_its_example(subject: str) -> None:
    example = (DOCS / "extend" / f"example_{subject}.py").read_text()
    explained = blocks(subject, "python")
    assert explained and all(code in example for code in explained)


@pytest.mark.parametrize(
    ("subject", "metric"),
    [
        ("algorithm", "regression_weight"),
        ("reward", "reward/spared"),
        ("environment", "turns_mean"),
    ],
)
def test_every_worked_example_trains(place: Path, subject: str, metric: str) -> None:
    (section,) = (yaml.safe_load(code) for code in blocks(subject, "yaml"))
    section.pop("task", None)  # its rows are those of the workplace
    path = write_run(place, f"extend-{subject}", runs_dir=str(place / "runs"), steps=2, **section)
    lorelei(place, "train", path.name)
    steps = records(place / "runs" / f"extend-{subject}", "step")
    assert [step["failed_rollouts"] for step in steps] == [0, 0]
    assert all(step[metric] > 0 for step in steps)
