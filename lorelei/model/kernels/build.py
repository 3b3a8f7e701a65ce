"""Compiles the C files here once for this processor and keeps the library in the cache folder.

Where the cache cannot be written or run from, they are compiled for the process alone. Where there
is no C compiler, no glibc or no OpenMP of torch's own, there are no kernels, and the decoder uses
torch's operations. Each says so in one line.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from lorelei.cache import cache_folder, warn

SOURCES = sorted(Path(__file__).parent.glob("*.[ch]"))
_SOFT = 1  # omp_pause_soft
_PATIENCE = 300  # seconds for one call of the compiler, which takes a few
_FLAGS = (
    *("-O3", "-march=native", "-fopenmp", "-fPIC", "-fno-math-errno", "-fno-trapping-math"),
    # such as -mno-avx512f, for kernels as a processor without it gets them
    *os.environ.get("LORELEI_CFLAGS", "").split(),
)


@cache
def library() -> ctypes.CDLL | None:
    """The kernels; None, with a warning, where they can be neither built nor loaded."""
    command = compiler_command()
    if command is None:
        reason = f"there is no C compiler {os.environ.get('CC', 'cc')!r} (CC)"
    elif _openmp() is None:
        reason = "torch has no OpenMP of its own here"
    else:
        folder = cache_folder() / "kernels"
        try:
            return _kept(command, folder)
        except OSError as error:
            reason = f"{folder}: {_words(error)}"
        try:
            found = _unkept(command)
        except OSError as error:
            reason += f"; elsewhere: {_words(error)}"
        else:
            warn(f"{reason}; kernels are compiled for this process alone (LORELEI_CACHE)")
            return found
    warn(f"{reason}; the decoder computes with torch's operations, slower")
    return None


def compiler_command() -> list[str] | None:
    """CC, which may have options, with its program's path; None where there is none."""
    try:
        command = shlex.split(os.environ.get("CC") or "cc")
    except ValueError:  # a quote that is not closed
        return None
    program = shutil.which(command[0]) if command else None
    return [program, *command[1:]] if program else None


def _kept(command: list[str], folder: Path) -> ctypes.CDLL:
    """Raises OSError where the folder can be neither written nor run from."""
    kept = folder / f"{_key(command)}.so"
    if not kept.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        _compile(command, kept)
    return ctypes.CDLL(str(kept))


def _unkept(command: list[str]) -> ctypes.CDLL:
    """From a folder that is gone when they are loaded; the mapping stays."""
    with tempfile.TemporaryDirectory(prefix="lorelei-") as folder:
        built = Path(folder) / "kernels.so"
        _compile(command, built)
        return ctypes.CDLL(str(built))


def _words(error: OSError) -> str:
    return error.strerror or " ".join(str(error).split())


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


def _key(command: list[str]) -> str:
    """Changes with the source, the compiler and the processor's instructions."""
    version = _output([*command, "--version"]).stdout
    info = Path("/proc/cpuinfo")
    lines = info.read_bytes().splitlines() if info.is_file() else []
    flags = next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
    parts = (
        *(source.read_bytes() for source in SOURCES),
        " ".join((*_FLAGS, *command[1:])).encode(),
        version,
        flags,
    )
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _compile(command: list[str], target: Path) -> None:
    """Raises OSError: nowhere to write, or what the compiler says."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        linked = Path(folder) / "kernels.so"
        programs = [source for source in SOURCES if source.suffix == ".c"]
        objects = [str(Path(folder) / f"{program.stem}.o") for program in programs]
        # two steps: linking with -fopenmp would name an OpenMP library besides torch's
        commands = [
            [*command, *_FLAGS, "-c", str(program), "-o", compiled]
            for program, compiled in zip(programs, objects, strict=True)
        ]
        for step in (*commands, [*command, "-shared", *objects, "-o", str(linked), "-lm"]):
            done = _output(step, folder)
            if done.returncode != 0:
                said = done.stderr.decode(errors="replace").strip().splitlines()
                raise OSError(f"{step[0]} fails ({said[-1] if said else done.returncode})")
        linked.replace(target)  # whole or not at all, whoever else builds it now


def _output(command: list[str], scratch: str | None = None) -> subprocess.CompletedProcess[bytes]:
    """scratch: for the compiler's own files; the default may be full. Raises OSError."""
    settings = {**os.environ, "TMPDIR": scratch} if scratch else None
    try:
        return subprocess.run(
            command,
            capture_output=True,
            check=False,
            timeout=_PATIENCE,
            env=settings,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{command[0]} does not end within {_PATIENCE} s") from error
