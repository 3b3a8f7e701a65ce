"""The manifest of a committed step: it names, with checksums, every file the step consists of.

`step` counts finished steps. A manifest that is there, with all its files as described, is a
checkpoint; nothing else is.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from lorelei.config.section import NAME_PATTERN
from lorelei.store.durable import CorruptFile, read_file
from lorelei.store.record import parse_record, read_record, record_bytes
from lorelei.types import AdapterRef


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRecord:
    """Where one adapter's job stands after a step."""

    version: int
    optimizer_step: int
    state: Mapping[str, Any]  # the job's own, plain JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterEntry:
    """An adapter in a manifest."""

    record: AdapterRecord
    snapshot: str  # path in the run folder; an untouched adapter keeps its earlier one
    ref: AdapterRef | None  # what rollout engines were given for record.version


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """What a file must be."""

    sha256: str
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """One committed step."""

    run: str
    incarnation: int  # of the process that committed it
    step: int
    created: str  # ISO 8601, UTC
    parent_step: int | None
    parent_sha256: str | None
    adapters: Mapping[str, AdapterEntry]
    files: Mapping[str, FileRecord]
    logs: Mapping[str, int]  # committed bytes of each log
    state: Mapping[str, Any]  # the loop's own
    sha256: str  # of the manifest itself; '' while it is a draft


_MANIFEST = TypeAdapter(Manifest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoints:
    """What verification found: manifests by rising step, and why the others are none."""

    verified: tuple[Manifest, ...]
    rejected: Mapping[Path, str]


def snapshot_path(adapter: str, step: int, sha256: str) -> str:
    """Where a snapshot lies in the run folder; step and content make the name unique."""
    return f"snapshots/{adapter}/{step:06d}-{sha256[:12]}.safetensors"


def manifest_path(folder: Path, step: int) -> Path:
    """Where the manifest of a step lies."""
    return folder / "manifests" / f"{step:06d}.json"


def manifest_paths(folder: Path) -> list[Path]:
    """All manifests of a run folder by rising step."""
    paths = (folder / "manifests").glob("*.json")
    return sorted((p for p in paths if p.stem.isdecimal()), key=lambda p: int(p.stem))


def manifest_bytes(manifest: Manifest) -> bytes:
    """Raises ValueError when a `state` is not plain JSON."""
    body = asdict(manifest)
    del body["sha256"]
    return record_bytes(body)


def read_manifest(path: Path) -> Manifest:
    """Raises CorruptFile, and StoreError for a newer format."""
    manifest = parse_record(_MANIFEST, read_record(path), path)
    if path.stem != f"{manifest.step:06d}":
        raise CorruptFile(f"{path}: is the manifest of step {manifest.step}")
    for name, entry in manifest.adapters.items():
        file = manifest.files.get(entry.snapshot)
        pattern = rf"snapshots/{re.escape(name)}/\d{{6,}}-[0-9a-f]{{12}}\.safetensors"
        if not NAME_PATTERN.fullmatch(name) or not re.fullmatch(pattern, entry.snapshot):
            raise CorruptFile(f"{path}: adapters.{name}: {entry.snapshot!r} is no snapshot of it")
        if file is None or f"-{file.sha256[:12]}." not in entry.snapshot:
            raise CorruptFile(f"{path}: adapters.{name}: files does not describe its snapshot")
    if odd := manifest.files.keys() - {e.snapshot for e in manifest.adapters.values()}:
        raise CorruptFile(f"{path}: files: {min(odd)!r} belongs to no adapter")
    return manifest


def read_checkpoints(folder: Path, run: str) -> Checkpoints:
    """Verify every manifest of a run, and all files they name. Raises StoreError."""
    verified: list[Manifest] = []
    rejected: dict[Path, str] = {}
    parents: dict[int | None, str | None] = {}  # step: sha256, as later manifests have it
    for path in reversed(manifest_paths(folder)):
        try:
            manifest = read_manifest(path)
        except CorruptFile as error:
            rejected[path] = str(error)
            continue
        if manifest.run != run:
            rejected[path] = f"{path}: belongs to run {manifest.run}, not to {run}"
        elif parents.get(manifest.step, manifest.sha256) != manifest.sha256:
            rejected[path] = f"{path}: is not what the manifest after it continues"
        elif problem := _file_problem(folder, manifest):
            rejected[path] = problem
        else:
            verified.append(manifest)
            parents[manifest.parent_step] = manifest.parent_sha256
    return Checkpoints(verified=tuple(reversed(verified)), rejected=rejected)


def _file_problem(folder: Path, manifest: Manifest) -> str | None:
    """The first file that is not as the manifest says."""
    for name, file in manifest.files.items():
        path = folder / name
        try:
            data = read_file(path)
        except CorruptFile as error:
            return str(error)
        if len(data) != file.size:
            return f"{path}: has {len(data)} bytes, must have {file.size}"
        if hashlib.sha256(data).hexdigest() != file.sha256:
            return f"{path}: damaged: its sha256 does not match the manifest"
    return None
