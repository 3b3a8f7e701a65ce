"""Compiles the C files here once for this processor and keeps the library in the cache folder.

Where there is no C compiler, no glibc or no OpenMP of torch's own, there are no kernels, and
the decoder uses torch's operations.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from lorelei.model.locate import cache_folder

SOURCES = sorted(Path(__file__).parent.glob("*.[ch]"))
_SOFT = 1  # omp_pause_soft
_FLAGS = (
    *("-O3", "-march=native", "-fopenmp", "-fPIC", "-fno-math-errno", "-fno-trapping-math"),
    # such as -mno-avx512f, for kernels as a processor without it gets them
    *os.environ.get("LORELEI_CFLAGS", "").split(),
)


@cache
def library() -> ctypes.CDLL | None:
    """The kernels; None where they cannot be built."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or _openmp() is None:
        return None
    built = cache_folder() / "kernels" / f"{_key(compiler)}.so"
    if not built.is_file() and not _compile(compiler, built):
        return None
    return ctypes.CDLL(str(built))


@cache
def _openmp() -> ctypes.CDLL | None:
    """torch's own OpenMP: a second one in the process would start its own threads besides."""
    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    if not found or platform.system() != "Linux":
        return None
    return ctypes.CDLL(str(found[0]), mode=ctypes.RTLD_GLOBAL)


def rest() -> None:
    """End the OpenMP helper threads of the calling thread; they start again when it computes.

    OpenMP gives every thread that computes its own team of helpers. While the teams together
    have more threads than there are cores, helpers sleep between two loops instead of spinning,
    and waking them takes longer than a short loop.
    """
    openmp = _openmp()
    if openmp is not None and torch.get_num_threads() > 1:
        openmp.omp_pause_resource_all(_SOFT)


def _key(compiler: str) -> str:
    """Changes with the source, the compiler and the processor's instructions."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    info = Path("/proc/cpuinfo")
    lines = info.read_bytes().splitlines() if info.is_file() else []
    flags = next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
    parts = (
        *(source.read_bytes() for source in SOURCES),
        " ".join(_FLAGS).encode(),
        version,
        flags,
    )
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _compile(compiler: str, target: Path) -> bool:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        linked = Path(folder) / "kernels.so"
        programs = [source for source in SOURCES if source.suffix == ".c"]
        objects = [str(Path(folder) / f"{program.stem}.o") for program in programs]
        # two steps: linking with -fopenmp would name an OpenMP library besides torch's
        commands = [
            [compiler, *_FLAGS, "-c", str(program), "-o", compiled]
            for program, compiled in zip(programs, objects, strict=True)
        ]
        for command in (*commands, [compiler, "-shared", *objects, "-o", str(linked), "-lm"]):
            if subprocess.run(command, capture_output=True, check=False).returncode != 0:
                return False
        linked.replace(target)  # whole or not at all, whoever else builds it now
    return True
