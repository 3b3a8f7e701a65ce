"""What an environment is made of, and where it is on this machine.

A recipe is a text file beside this one; each line is one step:
    pip ARGUMENT...                    pip of the environment
    alias NAME==VERSION TARGET==V      metadata of a package NAME that TARGET stands in for
    import MODULE                      must succeed
KIND.lock.txt pins everything that these steps bring; without the file, the newest is taken.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import lorelei
from lorelei.cache import cache_folder, writable_cache

PACKAGE = {"vllm": "vllm", "sglang": "sglang", "megatron": "megatron-core"}  # what it is made for
KINDS = tuple(PACKAGE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one kind of environment is made on this machine."""

    kind: str
    build: str  # cpu or cuda
    text: str
    lock: str = ""  # name==version lines

    @property
    def steps(self) -> list[list[str]]:
        """The words of each step."""
        lines = (line for line in self.text.splitlines() if not line.startswith("#"))
        return [line.split() for line in lines if line]

    @property
    def folder(self) -> Path:
        """Changes with the recipe and with Python's version."""
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        digest = hashlib.sha256(f"{python}\n{self.text}{self.lock}".encode()).hexdigest()[:12]
        return cache_folder() / "environments" / f"{self.kind}-{digest}"

    @property
    def python(self) -> Path:
        """The interpreter, whether it is there or not."""
        return self.folder / "bin" / "python"

    @property
    def marker(self) -> Path:
        """Written last: without it the environment is unfinished. Holds name and version of all
        packages as JSON.
        """
        return self.folder / "installed.json"


def recipe(kind: str) -> Recipe:
    """The recipe for this machine: the CUDA build where there is an NVIDIA driver.

    Raises ValueError for an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"environment: {kind!r} is not known; allowed: {', '.join(KINDS)}")
    build = "cuda" if Path("/dev/nvidiactl").exists() else "cpu"
    name = f"{kind}-cuda" if build == "cuda" else kind
    text, lock = (Path(__file__).with_name(f"{name}{end}.txt") for end in ("", ".lock"))
    pins = lock.read_text() if lock.exists() else ""
    return Recipe(kind=kind, build=build, text=text.read_text(), lock=pins)


def interpreter(kind: str) -> Path:
    """The Python that has vLLM, SGLang or Megatron.

    Raises ValueError where it is not installed, or not by this recipe.
    """
    made = recipe(kind)
    if not made.marker.is_file():
        raise ValueError(
            f"{kind} is not installed in {made.folder}; run `{command(kind)}`, about 5 minutes"
        )
    return made.python


def command(kind: str) -> str:
    """What a user types to install it: in a checkout, or where Lorelei came by pip."""
    checkout = (Path(lorelei.__file__).parents[1] / "Makefile").is_file()
    return f"make {kind}" if checkout else f"lorelei install {kind}"


def packages(kind: str) -> Mapping[str, str] | None:
    """Name and version of what is installed; None where it is not."""
    marker = recipe(kind).marker
    return json.loads(marker.read_text()) if marker.is_file() else None


def import_path() -> Path:
    """A folder for PYTHONPATH with Lorelei in it and nothing else.

    The folder that Lorelei is in may be site-packages, whose torch another interpreter must not
    see.
    """
    package = Path(lorelei.__file__).resolve().parent
    digest = hashlib.sha256(str(package).encode()).hexdigest()[:12]
    made = cache_folder() / "sources" / digest
    if os.path.isdir(made / "lorelei"):  # the digest is of the target
        return made
    link = writable_cache("sources") / digest / "lorelei"
    link.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        link.symlink_to(package, target_is_directory=True)
    return link.parent
