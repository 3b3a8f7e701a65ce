"""Who a run is: run.json, with its configuration and inputs, and incarnation.json, counted up by
every open. run.json is written again only for what was changed on purpose, which it lists.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

import lorelei
from lorelei.store.change import Change, now
from lorelei.store.durable import CorruptFile, StoreError, write_file
from lorelei.store.inputs import Inputs
from lorelei.store.record import parse_record, read_record, record_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The content of run.json."""

    run_id: str  # 8 hex digits
    created: str  # ISO 8601, UTC
    lorelei: str  # version that created the run
    config: Mapping[str, Any]  # resolved
    inputs: Inputs | None = None  # None: made by a version that did not record them
    changes: tuple[Change, ...] = ()

    def changed(self, changes: Iterable[Change], **fields: Any) -> Identity:
        """With `fields` replaced, and every change listed that its field did not last have."""
        last = {change.field: replace(change, created="") for change in self.changes}
        new = tuple(c for c in changes if replace(c, created="") != last.get(c.field))
        return replace(self, changes=(*self.changes, *new), **fields)


_IDENTITY = TypeAdapter(Identity)


def new_identity(config: Mapping[str, Any], inputs: Inputs | None = None) -> Identity:
    """A fresh identity."""
    return Identity(
        run_id=secrets.token_hex(4),
        created=now(),
        lorelei=lorelei.__version__,
        config=config,
        inputs=inputs,
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


def write_identity(folder: Path, identity: Identity) -> None:
    """The caller holds the folder's lock. Raises StoreError."""
    write_file(folder / "run.json", identity_bytes(identity))


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
