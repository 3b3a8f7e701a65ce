"""The code in docs/environments.md, run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from transformers import PreTrainedTokenizerFast

from lorelei.launch import local
from lorelei.run_file import load_config
from tests.tiny_models import make_tiny
from tests.tiny_runs import make_workplace, records, write_run

PAGE = Path(__file__).parents[2] / "docs" / "environments.md"
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
FOUND = BLOCK.findall(PAGE.read_text())
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
