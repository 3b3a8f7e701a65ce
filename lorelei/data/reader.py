"""Readers: the rows of a JSON-lines file, a parquet file or a Hugging Face dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

Rows = list[dict[str, Any]]


def read_jsonl(path: Path) -> Rows:
    """The objects of a file with one JSON object a line; empty lines are skipped."""
    rows: Rows = []
    with _existing(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"task.path: line {number} of {path} is not JSON "
                    f"({error.msg} at column {error.colno}); fix or remove it"
                ) from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"task.path: line {number} of {path} is a {type(cast(object, row)).__name__}, "
                    "each line must be an object {column: value}"
                )
            rows.append(cast(dict[str, Any], row))
    return rows


def read_parquet(path: Path) -> Rows:
    """The rows of a parquet file."""
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import read_table

    try:
        return read_table(_existing(path)).to_pylist()
    except ArrowInvalid as error:
        raise ValueError(f"task.path: {path} is not a parquet file ({error})") from error


def read_hf(path: str, name: str | None, split: str) -> Rows:
    """The rows of one split of a Hugging Face dataset: a name on the hub or a local folder."""
    import datasets

    try:
        return datasets.load_dataset(path, name, split=split).to_list()
    # OSError: not found or no network; ValueError: unknown configuration or split
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"task.path: the dataset {path!r} (name {name!r}, split {split!r}) "
            f"cannot be loaded: {reason}"
        ) from error


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"task.path: there is no file {path.absolute()}")
    return path
