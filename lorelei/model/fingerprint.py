"""What a model folder holds, as digests that tell one base model from another.

Cheap for large models: of more than `WHOLE` bytes of weights, names, types and shapes count and
`BLOCK` bytes at several places of each tensor. A change of a few values that misses these places is
not seen there. How tensors are dealt to files does not count, nor what transformers notes about
itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from lorelei.model.locate import WEIGHTS

WHOLE = 256 * 2**20  # bytes
BLOCK = 4096  # bytes
BLOCKS, BLOCKS_OF_MANY, MANY = 16, 4, 2000  # of a tensor; fewer of each where there are many
_CHUNK = 2**20  # bytes read at once

# what decides how text becomes tokens, how tokens become numbers, and where an answer ends
_SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
)
_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
_NOTES = ("transformers_version", "_name_or_path")


def model_digests(folder: Path) -> dict[str, str]:
    """{'weights' or a file's name: sha256}; a file that is not there has none."""
    digests = {"weights": weights_digest(folder)}
    for name in _SETTINGS:
        if (folder / name).is_file():
            digests[name] = _settings_digest(folder / name)
    for name in _FILES:
        if (folder / name).is_file():
            digests[name] = file_digest(folder / name)
    return digests


def file_digest(path: Path) -> str:
    """sha256 of the whole file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Span:
    """Where a tensor, or a file that is none of safetensors, lies."""

    name: str
    what: str  # type and shape
    start: int
    size: int  # bytes


def weights_digest(folder: Path) -> str:
    """sha256 over the tensors of a checkpoint by name, or over its GGUF file."""
    files = {path: list(_spans(path)) for path in _weight_files(folder)}
    spans = [span for held in files.values() for span in held]
    blocks = None  # all of it
    if sum(span.size for span in spans) > WHOLE:
        blocks = BLOCKS if len(spans) <= MANY else BLOCKS_OF_MANY
    found: dict[str, str] = {}
    for path, held in files.items():
        with open(path, "rb") as file:
            found |= {span.name: _span_digest(file, span, blocks) for span in held}
    lines = (f"{name}\0{value}\n" for name, value in sorted(found.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _weight_files(folder: Path) -> list[Path]:
    """The files that the index names, else every file of weights."""
    index = folder / "model.safetensors.index.json"
    try:
        named = set(json.loads(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        named = {path.name for path in (*folder.glob(WEIGHTS), *folder.glob("*.gguf"))}
    return sorted(folder / name for name in named if (folder / name).is_file())


def _spans(path: Path) -> Iterator[_Span]:
    """The tensors of a safetensors file; any other file is one span."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length <= size - 8 else b""
    try:
        entries = json.loads(header)
        yield from [
            _Span(
                name=name,
                what=f"{entry['dtype']} {entry['shape']}",
                start=8 + length + entry["data_offsets"][0],
                size=entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in entries.items()
            if name != "__metadata__"
        ]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):  # damaged, or GGUF
        yield _Span(name=path.name, what="file", start=0, size=size)


def _span_digest(file: BinaryIO, span: _Span, blocks: int | None) -> str:
    """blocks: places to read, None: all of it."""
    digest = hashlib.sha256(f"{span.what} {span.size}\n".encode())
    if blocks is None or span.size <= blocks * BLOCK:
        file.seek(span.start)
        left = span.size
        while left and (data := file.read(min(left, _CHUNK))):
            digest.update(data)
            left -= len(data)
    else:
        for number in range(blocks):
            file.seek(span.start + (span.size - BLOCK) * number // (blocks - 1))
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def _settings_digest(path: Path) -> str:
    """sha256 of a JSON file's values, whatever their order and white space."""
    data = path.read_bytes()
    try:
        values = json.loads(data)
    except ValueError:
        return hashlib.sha256(data).hexdigest()
    if isinstance(values, dict):
        kept = cast(dict[str, Any], values)
        values = {key: value for key, value in kept.items() if key not in _NOTES}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
