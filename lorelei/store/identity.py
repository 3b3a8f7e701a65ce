"""Who a run is: run.json, written once, and incarnation.json, counted up by every open."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

import lorelei
from lorelei.store.durable import CorruptFile, StoreError, write_file
from lorelei.store.record import parse_record, read_record, record_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The content of run.json."""

    run_id: str  # 8 hex digits
    created: str  # ISO 8601, UTC
    lorelei: str  # version that created the run
    config: Mapping[str, Any]  # resolved


_IDENTITY = TypeAdapter(Identity)


def now() -> str:
    """ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def new_identity(config: Mapping[str, Any]) -> Identity:
    """A fresh identity."""
    return Identity(
        run_id=secrets.token_hex(4), created=now(), lorelei=lorelei.__version__, config=config
    )


def identity_bytes(identity: Identity) -> bytes:
    """The content of run.json. Raises ValueError when the config is not plain JSON."""
    return record_bytes(asdict(identity))


def read_identity(folder: Path) -> Identity:
    """Raises StoreError for a folder that is no run, and CorruptFile."""
    path = folder / "run.json"
    if not path.exists():
        raise StoreError(f"{folder}: not a run folder, it has no run.json; create the run first")
    return parse_record(_IDENTITY, read_record(path), path)


def next_incarnation(folder: Path) -> tuple[int, str | None]:
    """Count this open, durably, before anything is named after it.

    Returns the count and a warning. Raises StoreError.
    """
    path = folder / "incarnation.json"
    try:
        count, warning = int(read_record(path)["incarnation"]) + 1, None
    except CorruptFile as error:
        # any number never used will do, and a count of opens never reaches the time
        count, warning = int(time.time()), f"{error}; went on counting from the time"
    write_incarnation(folder, count)
    return count, warning


def write_incarnation(folder: Path, count: int) -> None:
    """Raises StoreError."""
    write_file(folder / "incarnation.json", record_bytes({"incarnation": count}))
