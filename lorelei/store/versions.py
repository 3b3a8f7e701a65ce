"""Where the checkpoints of a run have a version of an adapter. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorelei.algo.frozen import RunVersion
from lorelei.store.durable import StoreError
from lorelei.store.manifest import AdapterEntry, manifest_paths, read_manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundVersion:
    """A snapshot of a version."""

    entry: AdapterEntry
    path: Path  # of the snapshot
    sha256: str


def find_version(version: RunVersion) -> FoundVersion | None:
    """In the earliest checkpoint that has it; None: in none, damaged ones not counted.

    An adapter may be trained on after its version was published and before the next one: only
    `entry.ref` tells whether the snapshot is that version.
    """
    for path in manifest_paths(version.run):
        try:
            manifest = read_manifest(path)
        except StoreError:
            continue
        entry = manifest.adapters.get(version.adapter)
        if entry is not None and entry.record.version == version.version:
            return FoundVersion(
                entry=entry,
                path=version.run / entry.snapshot,
                sha256=manifest.files[entry.snapshot].sha256,
            )
    return None
