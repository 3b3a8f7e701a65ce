"""The cache folder is optional: something stands in for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

UNKNOWN = 54321  # of a user that no file names, as containers have


def printed(code: str, **changed: str) -> tuple[str, list[str]]:
    """(the last line on stdout, stderr's lines) of a process whose user has no home folder."""
    keep = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME")}
    keep.pop("LORELEI_CACHE", None)
    start = f"import os; os.getuid = lambda: {UNKNOWN}\n"  # what expanduser asks for
    done = subprocess.run(
        [sys.executable, "-c", start + code],
        capture_output=True,
        text=True,
        check=True,
        env={**keep, **changed},
    )
    return done.stdout.strip().splitlines()[-1], done.stderr.splitlines()


@pytest.mark.parametrize(
    "code",
    [
        "from lorelei.cache import cache_folder\nprint(cache_folder().is_dir())",
        "from lorelei.cache import writable_cache\nprint(writable_cache('logs').is_dir())",
        "from lorelei.model.locate import local_folder\nprint(local_folder('a/b') is None)",
        "from lorelei.venvs.recipe import import_path\n"
        "print([x.name for x in import_path().iterdir()] == ['lorelei'])",
        "from lorelei.venvs.recipe import packages\nprint(packages('vllm') is None)",
        "from lorelei.plan.doctor import _short\nfrom pathlib import Path\n"
        "print(_short(Path('/x')) == '/x')",
    ],
)
def test_without_a_home_folder(code: str) -> None:
    said, warned = printed(code)
    assert said == "True"
    assert len(warned) <= 1 and all("there is no home folder" in line for line in warned)


@pytest.mark.parametrize("model", ["~nobody-of-this-name/model", "~"])
def test_a_users_folder_that_is_nowhere_is_one_line(model: str) -> None:
    code = (
        "from lorelei.model.locate import resolve_model\n"
        f"try: resolve_model({model!r})\nexcept ValueError as error: print(error)"
    )
    said, _ = printed(code)
    assert said.startswith("model: there is no folder '~")


def test_the_stand_in_is_private_and_gone_at_the_end() -> None:
    code = (
        "from lorelei.cache import cache_folder\n"
        "f = cache_folder(); print(oct(f.stat().st_mode & 0o777), f, f == cache_folder())"
    )
    (mode, folder, same), _ = printed(code)[0].split(), None
    assert (mode, same) == ("0o700", "True") and not Path(folder).exists()


@pytest.mark.parametrize("name", ["/proc", "/dev/full", "/dev/null/x"])
def test_a_cache_that_cannot_be_written_has_a_stand_in(name: str) -> None:
    code = (
        "from lorelei.cache import writable_cache\nfrom lorelei.venvs.recipe import import_path\n"
        "f = writable_cache('sources'); print(f.is_dir() and import_path().parent == f)"
    )
    said, warned = printed(code, LORELEI_CACHE=name)
    assert said == "True" and len(warned) == 1 and f"{name}/sources: " in warned[0]
