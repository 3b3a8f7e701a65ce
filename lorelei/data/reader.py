"""Readers: the rows of a JSON-lines file, a parquet file or a Hugging Face dataset."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from lorelei.config.errors import shown

Rows = list[dict[str, Any]]

# how files begin that are given for another kind: (bytes, what it is, what to do)
_KINDS: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "compressed (gzip)", "unpack it"),
    (b"BZh", "compressed (bzip2)", "unpack it"),
    (b"\xfd7zXZ", "compressed (xz)", "unpack it"),
    (b"\x28\xb5\x2f\xfd", "compressed (zstd)", "unpack it"),
    (b"PK\x03\x04", "compressed (zip)", "unpack it"),
    (b"PAR1", "a parquet file", "use task.kind: parquet"),
    (b"ARROW1", "an Arrow file", "use task.kind: hf with its folder, or save it as parquet"),
    (b"SQLite format 3", "an SQLite file", "save the table as JSON lines"),
    (b"\xff\xfe", "UTF-16 text", "save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "save it as UTF-8"),
    (b"version https://git-lfs", "a pointer of Git LFS", "get the file itself: git lfs pull"),
    (b"<", "HTML or XML", "download the file itself"),
    (b"[", "one JSON array", "write one object a line, as `jq -c '.[]'` does"),
    (b"{", "JSON text", "use task.kind: jsonl"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The rows of a data set, and what errors call them."""

    rows: Rows
    name: str  # in ids of rows
    source: str  # the file, or the data set
    unit: str = "row"
    numbers: Sequence[int] = field(default_factory=tuple[int, ...])  # of lines; (): from 0 on

    def number(self, index: int) -> int:
        """What a row is called in its file."""
        return self.numbers[index] if self.numbers else index

    def where(self, index: int) -> str:
        """A row as errors call it."""
        return f"{self.unit} {self.number(index)} of {self.source}"


def read_jsonl(path: Path) -> Table:
    """The objects of a file with one JSON object a line; empty lines are skipped."""
    rows: Rows = []
    numbers: list[int] = []
    with _existing(path).open("rb") as lines:
        _refuse_mislabelled(path, lines.read(64), jsonl=True)
        lines.seek(0)
        for number, line in enumerate(lines, start=1):
            row = _json_row(line, f"line {number} of {path}", first=number == 1)
            if row is not None:
                rows.append(row)
                numbers.append(number)
    return _checked(
        Table(rows=rows, name=path.stem, source=str(path), unit="line", numbers=numbers)
    )


def _json_row(line: bytes, where: str, first: bool) -> dict[str, Any] | None:
    """The object of a line, or None for an empty one. Raises ValueError naming the line."""
    try:
        text = line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"task.path: {where} is not UTF-8 text (byte {error.object[error.start]:#04x} at "
            f"{error.start}); save the file as UTF-8"
        ) from error
    if not text.strip():
        return None
    try:
        row = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"task.path: {where} is not JSON ({error.msg} at column {error.colno}); "
            "fix or remove it"
        ) from error
    except (ValueError, RecursionError) as error:  # a key given twice; too deep; a huge number
        raise ValueError(f"task.path: {where} cannot be read: {error}; fix it") from error
    if not isinstance(row, dict):
        raise ValueError(
            f"task.path: {where} is a {type(cast(object, row)).__name__}, "
            "each line must be an object {column: value}"
        )
    return cast(dict[str, Any], row)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {shown(twice)} is given twice")
    return found


def read_parquet(path: Path) -> Table:
    """The rows of a parquet file."""
    from pyarrow import ArrowException
    from pyarrow.parquet import read_schema, read_table

    with _existing(path).open("rb") as file:
        start = file.read(64)
    _refuse_mislabelled(path, start, jsonl=False)
    try:
        names = read_schema(path).names
        twice = [name for name in names if names.count(name) > 1]
        rows = [] if twice else read_table(path).to_pylist()
    # pyarrow says OSError of damaged pages, and ValueError of values that Python has not
    except (ArrowException, OSError, ValueError, OverflowError) as error:
        what = "is damaged" if start.startswith(b"PAR1") else "is not a parquet file"
        raise ValueError(f"task.path: {path} {what} ({_reason(error)}); get it again") from error
    if twice:
        raise ValueError(f"task.path: {path} has two columns {twice[0]!r}; rename one")
    return _checked(Table(rows=rows, name=path.stem, source=str(path)))


def read_hf(path: str, name: str | None, split: str) -> Table:
    """The rows of one split of a Hugging Face dataset: a name on the hub or a local folder."""
    import datasets

    words = f"the dataset {path!r} (name {name!r}, split {split!r})"
    try:
        with _quiet():
            rows = datasets.load_dataset(path, name, split=split).to_list()
    # The border to datasets, which raises whatever pyarrow, fsspec and the hub's client do.
    except Exception as error:
        raise ValueError(
            f"task.path: {words} cannot be loaded: {_hf_reason(error, path)}"
        ) from error
    return _checked(Table(rows=rows, name=f"{path}/{split}", source=words))


@contextmanager
def _quiet() -> Generator[None]:
    """Without progress and log lines of datasets, whose errors are told in our own."""
    import datasets

    bars, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def _hf_reason(error: Exception, path: str) -> str:
    """The reason in one line, with the fix where there is one."""
    import datasets

    text = _reason(error)
    if "scripts are no longer supported" in text:
        return f"{text}; it is code, which is not run: save its rows as parquet or JSON lines"
    if text.startswith("Config name is missing"):
        known = ", ".join(datasets.get_dataset_config_names(path))
        return f"it has several configurations; task.name: one of {known}"
    cause: BaseException | None = error.__cause__
    while cause is not None and cause.__cause__ is not None:
        cause = cause.__cause__
    return text if cause is None else f"{text} {_reason(cause)}"


def _reason(error: BaseException) -> str:
    """What an error says, in one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def _existing(path: Path) -> Path:
    if path.is_dir():
        raise ValueError(f"task.path: {path} is a folder; name a file, or use task.kind: hf")
    if not path.is_file():
        raise ValueError(f"task.path: there is no file {path.absolute()}")
    return path


def _refuse_mislabelled(path: Path, start: bytes, *, jsonl: bool) -> None:
    """Raises ValueError for a file that begins as one of another kind does."""
    own, not_this = (b"{", "") if jsonl else (b"PAR1", "not a parquet file, but ")
    for magic, what, fix in _KINDS:
        if magic != own and start.lstrip().startswith(magic):
            raise ValueError(f"task.path: {path} is {not_this}{what}; {fix}")


def _checked(table: Table) -> Table:
    """Raises ValueError for a row with text that cannot be written."""
    for index, row in enumerate(table.rows):
        for column, value in row.items():
            if not _is_text(column) or not _is_text(value):
                raise ValueError(
                    f"task.path: {table.where(index)}: the column {shown(column)} holds half a "
                    "character (a lone surrogate), which is no text; fix or remove the row"
                )
    return table


def _is_text(value: object) -> bool:
    """Whether all text in a value can be written as UTF-8."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return False
        return True
    if isinstance(value, Mapping):
        held = cast(Mapping[object, object], value)
        return all(_is_text(k) and _is_text(v) for k, v in held.items())
    if isinstance(value, list | tuple):
        return all(map(_is_text, cast(Sequence[object], value)))
    return True
