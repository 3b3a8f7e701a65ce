"""What a process on a CPU keeps of large blocks that it has freed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

BLOCK = 6 << 20  # bytes: the logits of 32 tokens with a vocabulary of 49152
# large blocks, each below a small one that stays
PROGRAM = f"""
import ctypes
from pathlib import Path
from lorelei.process import give_large_blocks_back

give_large_blocks_back()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def filled(size):
    address = libc.malloc(size)
    ctypes.memset(address, 1, size)
    return address

def held():
    status = dict(x.split(":", 1) for x in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) << 10

libc.free(filled(2 * {BLOCK}))  # glibc takes smaller ones from the heap from now on
before = held()
pairs = [(filled({BLOCK}), filled(64 << 10)) for _ in range(10)]
for large, small in pairs:
    libc.free(large)
print(held() - before)
"""


def grown(threshold: str | None) -> int:
    """Bytes; threshold: the environment's MALLOC_MMAP_THRESHOLD_."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    if threshold is not None:
        environment["MALLOC_MMAP_THRESHOLD_"] = threshold
    command = [sys.executable, "-c", PROGRAM]
    run = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return int(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap, and /proc")
def test_large_blocks_between_small_ones_go_back_unless_the_environment_says_otherwise() -> None:
    assert grown(None) < BLOCK
    assert grown(str(32 << 20)) > 5 * BLOCK
