"""Of which base model an adapter in PEFT's format is, as far as its folder says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from lorelei.lora.peft_folder import CONFIG
from lorelei.store.durable import read_file
from lorelei.store.record import json_object, parse_record, read_record, record_bytes

ORIGIN = "lorelei.json"  # beside PEFT's files; peft and the servers do not read it


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What an adapter was trained on."""

    base: Mapping[str, str]  # digests by part; empty: not written by `lorelei export`
    name: str | None  # PEFT's base_model_name_or_path


@dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    """The content of ORIGIN."""

    base_model: Mapping[str, str]


_ORIGIN = TypeAdapter(_Record)


def origin_bytes(base: Mapping[str, str]) -> bytes:
    """The content of ORIGIN. base: digests of the base model by part."""
    return record_bytes({"base_model": base})


def read_origin(folder: Path) -> Origin:
    """Raises CorruptFile naming the file."""
    config = json_object(read_file(folder / CONFIG), folder / CONFIG)
    name = config.get("base_model_name_or_path")
    path = folder / ORIGIN
    return Origin(
        base=parse_record(_ORIGIN, read_record(path), path).base_model if path.is_file() else {},
        name=name if isinstance(name, str) and name else None,
    )
