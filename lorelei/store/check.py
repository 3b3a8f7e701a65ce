"""Is a run folder what it says? Reads only, also while a run writes it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from lorelei.config.errors import ConfigError
from lorelei.model.locate import find_model
from lorelei.run_file import validate
from lorelei.store.durable import StoreError
from lorelei.store.identity import Identity, read_identity
from lorelei.store.inputs import differences, missing, read_inputs
from lorelei.store.leftover import temporary_files, unnamed_snapshots
from lorelei.store.lock import is_locked
from lorelei.store.log import LOGS
from lorelei.store.manifest import AdapterRecord, Manifest, read_checkpoints
from lorelei.store.record import read_record


def check_run(folder: Path) -> list[str]:
    """One line for each problem; empty: the folder is sound and a resume loses nothing.

    Verifies checksums, the chain of manifests, names, versions, logs, spooled groups, the inputs,
    and leftovers of a crash (not while a run is writing: then they are its work in progress).
    """
    running = is_locked(folder)
    problems: list[str] = []
    try:
        identity = read_identity(folder)
        found = read_checkpoints(folder, identity.run_id)
        # a running run retires manifests, and then their files, while we read
        problems += [why for path, why in found.rejected.items() if path.exists()]
        problems += _version_problems(found.verified)
        for name in LOGS:
            committed = found.verified[-1].logs[name] if found.verified else 0
            problems += _log_problems(folder / name, committed, running)
        problems += _damaged(folder / "spool")
        if not running:
            crumbs = [*unnamed_snapshots(folder, found.verified), *temporary_files(folder)]
            problems += [f"{p}: left over from a crash; the next resume removes it" for p in crumbs]
        read_record(folder / "incarnation.json")
        problems += _input_problems(identity)
    except StoreError as error:
        problems.append(str(error))
    return problems


def _input_problems(identity: Identity) -> Iterator[str]:
    """What the run was made with is there, and the same."""
    if identity.inputs is None:  # a resume records it
        return
    try:
        config = validate(dict(identity.config))
    except ConfigError as error:
        yield f"run.json: config: {error}"
        return
    found = read_inputs(config, find_model(config.model))
    yield from map(str, differences(identity.inputs, found))
    for field in missing(identity.inputs, found):
        yield f"{field}: what it names is not there, and a resume reads it"


def _version_problems(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Versions and optimizer steps never fall; a served ref is of its adapter's version."""
    highest: dict[str, AdapterRecord] = {}
    for manifest in manifests:
        for name, entry in manifest.adapters.items():
            where, record, ref = f"step {manifest.step}: adapters.{name}", entry.record, entry.ref
            before = highest.get(name, record)
            if record.version < before.version:
                yield f"{where}.version: {record.version} is below the earlier {before.version}"
            if record.optimizer_step < before.optimizer_step:
                yield (
                    f"{where}.optimizer_step: {record.optimizer_step} is below the earlier "
                    f"{before.optimizer_step}"
                )
            if ref is not None and (ref.name, ref.version) != (name, record.version):
                yield f"{where}.ref: {ref} is not version {record.version}"
            highest[name] = record


def _damaged(spool: Path) -> Iterator[str]:
    for path in sorted(spool.rglob("*.json")):
        try:
            read_record(path)
        except StoreError as error:
            if path.exists():  # else trained on, and gone
                yield str(error)


def _log_problems(path: Path, committed: int, running: bool) -> Iterator[str]:
    """Every line is JSON, the committed bytes are there and end a line."""
    if not path.exists():
        if committed:
            yield f"{path}: missing, {committed} bytes are committed"
        return
    end = 0
    ends_line = committed == 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            end += len(line)
            ends_line = ends_line or end == committed
            if not line.endswith(b"\n"):
                if not running:
                    yield f"{path}: line {number}: cut off"
                break
            try:
                json.loads(line)
            except ValueError as error:
                yield f"{path}: line {number}: not JSON: {error}"
    if end < committed:
        yield f"{path}: has {end} bytes, {committed} are committed"
    elif not ends_line:
        yield f"{path}: the committed {committed} bytes end inside a line"
