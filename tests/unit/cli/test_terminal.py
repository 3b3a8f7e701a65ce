"""What files, models and rewards hold cannot act on the terminal of who reads an error."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lorelei.cli import main as cli
from lorelei.cli.arguments import say

ESCAPE = "\x1b[31mRED\x1b[2J"
RUN = "model: org/name\ntask: {kind: reasoning_gym, name: chain_sum}\n"

COMMANDS = {
    "the name of a file": ["plan", f"{ESCAPE}.yaml"],
    "the name of a run": ["resume", f"runs/{ESCAPE}"],
    "the key of an override": ["plan", "run.yaml", f"{ESCAPE}=1"],
    "the value of an override": ["plan", "run.yaml", f"dtype={ESCAPE}"],
    "a key of the file": ["plan", "key.yaml"],
    "a value of the file": ["plan", "value.yaml"],
    "a title that sets the window's": ["check", "\x1b]0;owned\x07"],
    "text that is turned around": ["plan", "run.yaml", "dtype=\u202egnp.exe"],
    "an 8-bit control": ["plan", "run.yaml", "dtype=\x9b31m"],
}


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_an_error_quotes_control_characters_escaped(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(RUN)
    Path("key.yaml").write_text(RUN + '"\\e[31mRED": 1\n')
    Path("value.yaml").write_text(RUN + 'dtype: "\\e[31mRED\\x00"\n')
    monkeypatch.setattr(sys, "argv", ["lorelei", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and err.startswith("error: ")
    assert len(err.splitlines()) == 1 and err.strip().isprintable(), err


def test_what_is_said_keeps_its_lines_and_its_letters(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"één {ESCAPE}\n✓ \x00 two")
    assert capsys.readouterr().out == "één \\x1b[31mRED\\x1b[2J\n✓ \\x00 two\n"
