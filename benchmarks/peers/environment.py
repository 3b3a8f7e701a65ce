"""The peers' own virtual environment, in the cache folder under a hash of its recipe.

usage: python -m benchmarks.peers.environment   (make peers)
llama-cpp-python comes as source and is compiled for this machine: about 10 minutes.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from lorelei.cache import cache_folder

RECIPE = Path(__file__).with_name("requirements.txt")
LLAMA_CPP_BUILD = "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"


def peers_python() -> Path:
    """The interpreter, whether it is there or not."""
    digest = hashlib.sha256(RECIPE.read_bytes()).hexdigest()[:12]
    return cache_folder() / "envs" / f"peers-{digest}" / "bin" / "python"


def main() -> None:
    python = peers_python()
    done = python.parents[1] / "installed"
    if done.exists():
        return
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(python.parents[1])], check=True)
    pip = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    torch, *rest = RECIPE.read_text().split()
    subprocess.run([*pip, torch], check=True)  # first and alone: see the Makefile
    settings = {**os.environ, "CMAKE_ARGS": LLAMA_CPP_BUILD}
    subprocess.run([*pip, torch, *rest], env=settings, check=True)
    done.touch()


if __name__ == "__main__":
    main()
