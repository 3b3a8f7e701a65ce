"""Looking at runs: a summary of each, and an SQLite index of one, rebuilt from its files."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorelei.store.durable import CorruptFile, StoreError, write_file
from lorelei.store.identity import read_identity
from lorelei.store.lock import is_locked
from lorelei.store.manifest import Manifest, is_finished, manifest_paths, read_manifest

Status = Literal["running", "finished", "stopped", "damaged"]

_SCHEMA = """
create table steps (step integer primary key, created text, incarnation integer, state json);
create table adapters (
    step integer, adapter text, version integer, optimizer_step integer, state json,
    served_name text, snapshot text, sha256 text, size integer, primary key (step, adapter)
);
create table metrics (line integer primary key, record json);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """One line of `lorelei runs`."""

    name: str
    model: str
    steps: int  # committed
    adapters: tuple[str, ...]
    reward: float | None  # `reward` and `score` of the jobs' states; mean over adapters
    score: float | None
    updated: str  # ISO 8601, UTC
    status: Status  # damaged: see check_run


def list_runs(folder: Path) -> list[RunSummary]:
    """The runs in a folder, most recently updated first. Reads only, without verifying."""
    runs = [_summary(path.parent) for path in folder.glob("*/run.json")]
    return sorted(runs, key=lambda run: run.updated, reverse=True)


def rebuild_index(folder: Path) -> Path:
    """Write index.sqlite anew: tables steps, adapters (kept checkpoints) and metrics (all lines).

    Needs no lock: the file is replaced whole. Raises StoreError.
    """
    index = sqlite3.connect(":memory:")  # not in the folder: SQLite's locks fail on network disks
    try:
        index.executescript(_SCHEMA)
        for path in manifest_paths(folder):
            _add(index, read_manifest(path))
        metrics = folder / "metrics.jsonl"
        if metrics.exists():
            with open(metrics, encoding="utf-8") as lines:
                index.executemany("insert into metrics values (?, ?)", enumerate(lines, start=1))
        index.commit()
        data = index.serialize()
    finally:
        index.close()
    write_file(folder / "index.sqlite", data)
    return folder / "index.sqlite"


def _add(index: sqlite3.Connection, manifest: Manifest) -> None:
    index.execute(
        "insert into steps values (?, ?, ?, ?)",
        (manifest.step, manifest.created, manifest.incarnation, json.dumps(manifest.state)),
    )
    for name, entry in manifest.adapters.items():
        record, file = entry.record, manifest.files[entry.snapshot]
        row = (
            manifest.step,
            name,
            record.version,
            record.optimizer_step,
            json.dumps(record.state),
            entry.ref.served_name if entry.ref else None,
            entry.snapshot,
            file.sha256,
            file.size,
        )
        index.execute("insert into adapters values (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)


def _summary(folder: Path) -> RunSummary:
    model, updated, damaged = "", "", False
    config: Mapping[str, Any] = {}
    latest: Manifest | None = None
    try:
        identity = read_identity(folder)
        config, updated = identity.config, identity.created
        model = str(config.get("model", ""))
    except StoreError:
        damaged = True
    for path in reversed(manifest_paths(folder)):
        try:
            latest = read_manifest(path)
            break
        except CorruptFile:
            # a running run may have retired it since the listing
            damaged = damaged or path.exists()
    status: Status = "stopped"
    if damaged:
        status = "damaged"
    elif is_locked(folder):
        status = "running"
    elif latest is not None and is_finished(latest, config):
        status = "finished"
    return RunSummary(
        name=folder.name,
        model=model,
        steps=latest.step if latest else 0,
        adapters=tuple(latest.adapters) if latest else (),
        reward=_mean(latest, "reward"),
        score=_mean(latest, "score"),
        updated=latest.created if latest else updated,
        status=status,
    )


def _mean(manifest: Manifest | None, key: str) -> float | None:
    """Of what the jobs' states have under a key."""
    entries = manifest.adapters.values() if manifest else ()
    values = [entry.record.state.get(key) for entry in entries]
    numbers = [float(v) for v in values if isinstance(v, int | float)]
    return sum(numbers) / len(numbers) if numbers else None
