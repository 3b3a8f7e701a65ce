"""The kernels as a processor without AVX-512 gets them, on one that has it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lorelei.model.kernels.build import library
from lorelei.model.kernels.fused import lanes

TESTS = ("model/test_kernels", "model/test_attention", "inference/test_whole_step")


@pytest.mark.slow
@pytest.mark.skipif(
    library() is None or lanes() == 8, reason="the kernels of this machine are these, or none"
)
def test_kernels_for_avx2_pass_the_same_tests() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    files = [f"tests/unit/{name}.py" for name in TESTS]
    narrow = {**os.environ, "LORELEI_CFLAGS": "-mno-avx512f"}
    width = "from lorelei.model.kernels.fused import lanes; assert lanes() == 8"
    subprocess.run([sys.executable, "-c", width], env=narrow, check=True)
    done = subprocess.run([*command, *files], env=narrow, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
