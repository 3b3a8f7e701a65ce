"""How many parameters the frozen adapters of a run have, read from the heads of their files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open

from lorelei.algo.frozen import frozen_adapters, parse_version
from lorelei.config.run import RunConfig
from lorelei.store.versions import find_version

FP32 = 4  # bytes of a parameter in a file that does not say


def frozen_size(config: RunConfig) -> int:
    """Of all together, each once; a file that cannot be read counts nothing here."""
    named = [v for e in config.experiments() for v in frozen_adapters(e.algo).values()]
    return sum(_parameters(one) for one in dict.fromkeys(named))


def _parameters(named: str) -> int:
    version = parse_version(named)
    if version is not None:
        found = find_version(version)
        return _of_tensors(found.path) if found else 0
    path = Path(named, "adapter_model.safetensors")
    other = path.with_suffix(".bin")
    if not path.is_file() and other.is_file():
        return other.stat().st_size // FP32
    return _of_tensors(path)


def _of_tensors(path: Path) -> int:
    """Of LoRA matrices alone: a snapshot has Adam's moments too."""
    try:
        with cast(Any, safe_open(path, framework="numpy")) as file:
            names: list[str] = [name for name in file.keys() if not name.startswith("exp_avg")]  # noqa: SIM118
            return sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    except (OSError, SafetensorError):
        return 0
