"""An append-only file of JSON lines, whose committed length a manifest records."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from lorelei.store.durable import write_error, writing

LOGS = ("metrics.jsonl", "rollouts.jsonl")  # of a run folder


class JsonLog:
    """One log, open for appending by one thread at a time."""

    def __init__(self, path: Path) -> None:
        """Raises StoreError."""
        self.path = path
        with writing(path):
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()

    @property
    def size(self) -> int:
        """Bytes."""
        return os.fstat(self._file.fileno()).st_size

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add one line a record; all of them or, with a StoreError, none.

        NaN and infinities become null; NumPy values become plain ones.
        """
        lines = "".join(json.dumps(_plain(r), allow_nan=False) + "\n" for r in records)
        left = memoryview(lines.encode())
        before = self.size
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self._file.truncate(before)
            raise write_error(self.path, error) from error

    def sync(self) -> int:
        """Make all lines durable. Returns the size."""
        with writing(self.path):
            os.fsync(self._file.fileno())
        return self.size

    def truncate(self, size: int) -> None:
        """Forget what was written after `size` bytes."""
        with writing(self.path):
            self._file.truncate(size)
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Idempotent."""
        self._file.close()


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        value = cast(Any, value).tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        items = cast(Mapping[Any, Any], value).items()
        return {str(key): _plain(item) for key, item in items}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in cast(list[Any], value)]
    return value
