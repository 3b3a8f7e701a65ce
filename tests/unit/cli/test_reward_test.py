"""`lorelei reward test`: what a reward says of a few texts."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from lorelei.cli.main import app

SOURCE = """
def f(completion, answer, **row):
    if not completion: raise KeyError("empty")
    return float(completion == answer), {"length": len(completion)}

def group(completions, **columns): return [len(c) for c in completions]

def stop(completion): print("\\x1b[2J"); return None
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "rewards.py").write_text(SOURCE)
    return tmp_path / "rewards.py"


def run(*arguments: str) -> tuple[int, list[str]]:
    result = CliRunner().invoke(app, ["reward", "test", *arguments])
    if isinstance(result.exception, ValueError):
        return 2, [str(result.exception)]
    return result.exit_code, result.output.splitlines()


def test_results_metrics_and_seconds_are_shown(path: Path):
    code, (loaded, *lines) = run(f"{path}:f", "-c", "a", "-c", "b", "--column", "answer=b")
    assert code == 0 and loaded.startswith("loaded in ")
    assert [line.partition(" s  ")[2] for line in lines] == [
        "'a': reward 0.0  length 1",
        "'b': reward 1.0  length 1",
    ]


def test_the_answer_and_an_empty_text_are_tried_by_default_and_errors_are_exit_code_1(path: Path):
    code, lines = run(f"{path}:f", "--column", "answer=7")
    assert code == 1
    assert "'7': reward 0.0" in lines[1]  # a number in YAML, and no text
    assert lines[2].endswith("'': raised KeyError: 'empty'")


def test_a_reward_of_whole_groups_is_called_once(path: Path):
    code, lines = run(f"{path}:group", "-c", "a", "-c", "bb")
    assert code == 0
    assert [line.rpartition(": ")[2] for line in lines[1:]] == ["reward 1.0", "reward 2.0"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("absent.py:f",), "reward.path: there is no file"),
        (("absent.yaml",), "absent.yaml"),
        (("{path}:f", "reward.timeout=3"), "is not a run"),
        (("{path}:f", "--column", "answer"), "must be NAME=VALUE"),
        (("{path}:f", "--column", "a=["), "is not YAML"),
    ],
)
def test_what_cannot_be_tested_is_one_line(path: Path, arguments: tuple[str, ...], part: str):
    code, lines = run(*(a.replace("{path}", str(path)) for a in arguments))
    assert code == 2 and part in lines[0]
