"""Kernels are optional: no state of the cache, the compiler or the home folder ends a run."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lorelei.model.kernels import build

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")


@pytest.fixture
def answer(tmp_path, monkeypatch, caplog):
    """(whether there are kernels, the warnings): a source of one function in place of ours."""
    source = tmp_path / "one.c"
    source.write_text("int one(void) { return 1; }")
    monkeypatch.setattr(build, "SOURCES", [source])
    monkeypatch.setenv("LORELEI_CACHE", str(tmp_path / "cache"))

    def ask() -> tuple[bool, list[str]]:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = build.library.__wrapped__()
        return found is not None and found.one() == 1, caplog.messages

    return ask


def a_file(folder: Path) -> None:
    """Something is in the way; root may write to read-only folders, so they prove nothing here."""
    folder.write_text("")


def a_file_inside(folder: Path) -> None:
    folder.mkdir()
    (folder / "kernels").write_text("")


def a_dangling_link(folder: Path) -> None:
    folder.symlink_to(folder.parent / "absent" / "absent")


def a_link_to_itself(folder: Path) -> None:
    folder.symlink_to(folder)


def below_proc(folder: Path) -> None:
    folder.symlink_to("/proc")


def a_full_disk(folder: Path) -> None:
    folder.symlink_to("/dev/full")


@needs_compiler
@pytest.mark.parametrize(
    "spoil",
    [a_file, a_file_inside, a_dangling_link, a_link_to_itself, below_proc, a_full_disk],
)
def test_a_cache_that_cannot_be_written_costs_one_warning(
    tmp_path: Path, answer: Callable[[], tuple[bool, list[str]]], spoil: Callable[[Path], None]
) -> None:
    spoil(tmp_path / "cache")
    there, (line,) = answer()
    assert there
    assert line.startswith("warning: ") and "for this process alone (LORELEI_CACHE)" in line


@needs_compiler
def test_a_damaged_library_is_built_elsewhere(tmp_path: Path, answer) -> None:
    (tmp_path / "cache" / "kernels").mkdir(parents=True)
    command = build.compiler_command()
    assert command is not None
    kept = tmp_path / "cache" / "kernels" / f"{build._key(command)}.so"
    kept.write_bytes(b"not a library")
    there, (line,) = answer()
    assert there and str(kept) in line


def script(folder: Path, text: str) -> str:
    program = folder / "compiler"
    program.write_text(text)
    program.chmod(0o755)
    return str(program)


@pytest.mark.parametrize(
    ("compiler", "expected"),
    [
        (lambda folder: "none", "there is no C compiler 'none' (CC)"),
        (lambda folder: "cc 'half", "there is no C compiler"),
        (lambda folder: script(folder, "#!/bin/sh\nexit 3\n"), "compiler fails (3)"),
        (
            lambda folder: script(folder, "#!/bin/sh\necho no space left >&2\nexit 1\n"),
            "compiler fails (no space left)",
        ),
        (lambda folder: script(folder, "\x7fELF of another machine"), "Exec format error"),
        (lambda folder: script(folder, "#!/absent/interpreter\n"), "No such file or directory"),
    ],
)
def test_a_compiler_that_does_not_work_costs_one_warning(
    tmp_path: Path, answer, monkeypatch, compiler: Callable[[Path], str], expected: str
) -> None:
    monkeypatch.setenv("CC", compiler(tmp_path))
    there, (line,) = answer()
    assert not there
    assert line.startswith("warning: ") and expected in line and "torch's operations" in line


@needs_compiler
@pytest.mark.parametrize("compiler", ["cc -g", "cc -O3 '-DNAME=two words'"])
def test_a_compiler_may_have_options(answer, monkeypatch, compiler: str) -> None:
    monkeypatch.setenv("CC", compiler)
    assert answer() == (True, [])


@needs_compiler
def test_of_a_group_of_workers_the_first_warns(tmp_path: Path, answer, monkeypatch) -> None:
    a_file(tmp_path / "cache")
    monkeypatch.setenv("RANK", "1")
    assert answer() == (True, [])
    monkeypatch.setenv("RANK", "0")
    assert len(answer()[1]) == 1
