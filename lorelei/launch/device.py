"""Whether a run would use an accelerator, found without torch (see model.backend)."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def has_accelerator() -> bool:
    """A GPU's driver, and a build of torch that can use it."""
    try:
        build = version("torch")
    except PackageNotFoundError:
        return False
    if sys.platform == "darwin":
        return platform.machine() == "arm64"
    if build.endswith("+cpu") or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return False
    return any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/kfd"))  # NVIDIA, AMD
