"""The run folder while a run writes it.

    runs/<name>/
      run.json           who the run is, its config; written once
      incarnation.json   how often it was opened
      lock               flock of the process that writes
      manifests/         000012.json: step 12 is true
      snapshots/<adapter>/000012-<digest>.safetensors
      metrics.jsonl, rollouts.jsonl
      index.sqlite       for queries, see index.py

A step becomes true when its manifest is renamed into place; `stage` before it and the cleaning
after it may be cut at any point. Methods are synchronous and do fsync: call them from one thread
at a time, from an event loop through asyncio.to_thread.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorelei.config.section import NAME_PATTERN
from lorelei.lora.state import AdapterSnapshot
from lorelei.store.durable import (
    CorruptFile,
    StoreError,
    delete_file,
    make_folder,
    sync_folder,
    write_file,
)
from lorelei.store.identity import (
    Identity,
    identity_bytes,
    new_identity,
    next_incarnation,
    now,
    read_identity,
    write_incarnation,
)
from lorelei.store.leftover import delete_run, temporary_files, unnamed_snapshots
from lorelei.store.lock import FolderLock
from lorelei.store.log import LOGS, JsonLog
from lorelei.store.manifest import (
    AdapterEntry,
    AdapterRecord,
    FileRecord,
    Manifest,
    manifest_bytes,
    manifest_path,
    manifest_paths,
    read_checkpoints,
    read_manifest,
    snapshot_path,
)
from lorelei.store.snapshot import read_snapshot, snapshot_bytes
from lorelei.types import AdapterRef


class RunStore:
    """One run folder, locked. Make one with `create` or `open`."""

    def __init__(
        self,
        folder: Path,
        lock: FolderLock,
        identity: Identity,
        incarnation: int,
        manifests: Sequence[Manifest] = (),
        keep: int = 2,
    ) -> None:
        """Not for callers."""
        self.folder = folder
        self.config = identity.config
        self.warnings: list[str] = []
        self._lock = lock
        self._identity = identity
        self._incarnation = incarnation
        self._manifests = list(manifests)  # verified, by rising step
        self._keep = keep
        self._logs = {name: JsonLog(folder / name) for name in LOGS}

    @classmethod
    def create(cls, folder: Path, config: Mapping[str, Any], keep: int = 2) -> RunStore:
        """Start a new run in a folder that has none.

        config: resolved, plain JSON. keep: checkpoints to keep. Raises ValueError.
        """
        _check_keep(keep)
        if not NAME_PATTERN.fullmatch(folder.name):
            raise ValueError(f"run name: {folder.name!r} must match {NAME_PATTERN.pattern}")
        identity = new_identity(config)
        data = identity_bytes(identity)
        make_folder(folder / "manifests")
        make_folder(folder / "snapshots")
        with ExitStack() as undo:
            lock = FolderLock(folder)
            undo.callback(lock.release)
            if (folder / "run.json").exists() or manifest_paths(folder):
                raise StoreError(f"{folder}: has a run already; resume it or choose another name")
            undo.callback(delete_run, folder)
            write_incarnation(folder, 1)
            store = cls(folder, lock, identity, 1, keep=keep)
            write_file(folder / "run.json", data)  # last: now the run exists
            undo.pop_all()
        return store

    @classmethod
    def open(cls, folder: Path, keep: int = 2) -> RunStore:
        """Go back to the newest checkpoint that verifies and forget everything after it.

        `warnings` names every checkpoint that was passed over. Raises StoreError when the folder
        has no run, is in use, or has checkpoints of which none verifies (then nothing is
        changed).
        """
        _check_keep(keep)
        read_identity(folder)  # before the lock, which makes a file
        with ExitStack() as undo:
            lock = FolderLock(folder)
            undo.callback(lock.release)
            identity = read_identity(folder)
            found = read_checkpoints(folder, identity.run_id)
            if found.rejected and not found.verified:
                reasons = "; ".join(found.rejected.values())
                raise CorruptFile(
                    f"{folder}: no checkpoint verifies ({reasons}); restore the files or start a "
                    "new run"
                )
            incarnation, warning = next_incarnation(folder)
            store = cls(folder, lock, identity, incarnation, found.verified, keep)
            undo.callback(store.close)
            store.warnings += [f"{p.name} passed over: {why}" for p, why in found.rejected.items()]
            store.warnings += [warning] if warning else []
            store._clean(found.rejected)
            undo.pop_all()
        return store

    @property
    def run_id(self) -> str:
        """For AdapterRef.run_id: differs in every open, so no version name comes twice."""
        return f"{self._identity.run_id}i{self._incarnation}"

    @property
    def latest(self) -> Manifest | None:
        """The last committed step; None: no step was committed."""
        return self._manifests[-1] if self._manifests else None

    def load(self, adapter: str) -> AdapterSnapshot:
        """The adapter's snapshot at `latest`. Raises KeyError and CorruptFile."""
        if self.latest is None:
            raise KeyError(f"{adapter!r} has no snapshot, no step was committed")
        if adapter not in self.latest.adapters:
            known = sorted(self.latest.adapters)
            raise KeyError(f"{adapter!r} is not in the checkpoint, which has {known}")
        path = self.latest.adapters[adapter].snapshot
        return read_snapshot(self.folder / path, self.latest.files[path].sha256)

    def stage(
        self,
        step: int,
        snapshots: Mapping[str, AdapterSnapshot],
        adapters: Mapping[str, AdapterRecord],
        state: Mapping[str, Any],
    ) -> Manifest:
        """Write the files of a step, which is not true yet; its draft goes to `commit`.

        step: finished steps, this one included. snapshots: of every adapter that moved since
        `latest`. adapters: all adapters of the run as of this step; `list_runs` reads `reward` and
        `score` of their states. state: the loop's own, plain JSON; `list_runs` reads `finished`.
        An earlier draft that was not committed is void. Raises ValueError.
        """
        parent = self.latest
        last = parent.step if parent else -1
        if step <= last:
            raise ValueError(f"step: {step} must be after the committed step {last}")
        if unknown := snapshots.keys() - adapters.keys():
            raise ValueError(f"snapshots: {min(unknown)!r} is not in adapters")
        data: dict[str, bytes] = {}
        files: dict[str, FileRecord] = {}
        entries: dict[str, AdapterEntry] = {}
        for name, record in adapters.items():
            earlier = parent.adapters.get(name) if parent else None
            _check_record(name, record, snapshots.get(name), earlier)
            if name in snapshots:
                content = snapshot_bytes(snapshots[name])
                sha256 = hashlib.sha256(content).hexdigest()
                path = snapshot_path(name, step, sha256)
                data[path], files[path] = content, FileRecord(sha256=sha256, size=len(content))
            else:
                assert parent and earlier  # _check_record
                path = earlier.snapshot
                files[path] = parent.files[path]
            same = earlier is not None and earlier.record.version == record.version
            entries[name] = AdapterEntry(
                record=record, snapshot=path, ref=earlier.ref if earlier and same else None
            )
        draft = Manifest(
            run=self._identity.run_id,
            incarnation=self._incarnation,
            step=step,
            created=now(),
            parent_step=parent.step if parent else None,
            parent_sha256=parent.sha256 if parent else None,
            adapters=entries,
            files=files,
            logs=dict.fromkeys(LOGS, 0),
            state=state,
            sha256="",
        )
        manifest_bytes(draft)  # refuses a state that is not JSON while nothing is written
        for path, content in data.items():
            make_folder((self.folder / path).parent)
            write_file(self.folder / path, content)
        return copy.deepcopy(draft)  # the loop may go on changing its state

    def commit(
        self,
        draft: Manifest,
        refs: Mapping[str, AdapterRef],
        states: Mapping[str, Mapping[str, Any]] | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """Make a staged step true, with the log lines written so far.

        refs: what inference engines were given, for the adapters whose version is new. states,
        state: of jobs, and more of the loop's own, as they are known by now. Raises ValueError for
        refs of other versions: then the step did not happen. After a StoreError only `open` can
        tell.
        """
        assert draft.parent_sha256 == (self.latest.sha256 if self.latest else None), "void draft"
        for name, ref in refs.items():
            entry = draft.adapters.get(name)
            version = entry.record.version if entry else None
            if ref.name != name or ref.version != version:
                raise ValueError(f"refs: {name!r} is {ref}, staged is version {version}")
        entries: dict[str, AdapterEntry] = {}
        for name, entry in draft.adapters.items():
            record = replace(entry.record, state=(states or {}).get(name, entry.record.state))
            entries[name] = replace(entry, record=record, ref=refs.get(name, entry.ref))
        manifest = replace(
            draft,
            created=now(),
            adapters=entries,
            logs={name: log.sync() for name, log in self._logs.items()},
            state={**draft.state, **(state or {})},
        )
        sync_folder(self.folder)  # the logs' names
        path = manifest_path(self.folder, manifest.step)
        write_file(path, manifest_bytes(manifest))
        self._manifests.append(read_manifest(path))
        self._retire()

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl; part of the next commit. NaN and infinities become null."""
        self._logs["metrics.jsonl"].append([record])

    def append_rollouts(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add lines to rollouts.jsonl; part of the next commit. NaN and infinities become null."""
        self._logs["rollouts.jsonl"].append(records)

    def discard(self) -> None:
        """Delete a run in which no step was committed, and close it."""
        assert self.latest is None
        delete_run(self.folder)
        self.close()

    def close(self) -> None:
        """Free the folder. Idempotent."""
        for log in self._logs.values():
            log.close()
        self._lock.release()

    def _retire(self) -> None:
        """Delete manifests beyond `keep`, then the snapshots that no manifest names."""
        old, self._manifests = self._manifests[: -self._keep], self._manifests[-self._keep :]
        # manifests first: one that is there must have its files
        for manifest in old:
            delete_file(manifest_path(self.folder, manifest.step))
        if old:
            sync_folder(self.folder / "manifests")
        for path in list(unnamed_snapshots(self.folder, self._manifests)):
            delete_file(path)

    def _clean(self, rejected: Iterable[Path]) -> None:
        """Remove what a crash left: a later step would meet it."""
        for path in sorted(rejected, reverse=True):
            delete_file(path)
        sync_folder(self.folder / "manifests")
        unnamed = unnamed_snapshots(self.folder, self._manifests)
        for path in [*unnamed, *temporary_files(self.folder)]:
            delete_file(path)
        for name, log in self._logs.items():
            committed = self.latest.logs[name] if self.latest else 0
            if log.size < committed:
                self.warnings.append(
                    f"{name}: has {log.size} of {committed} committed bytes; history was lost"
                )
            else:
                log.truncate(committed)


def _check_keep(keep: int) -> None:
    if keep < 2:
        raise ValueError(f"checkpoint.keep: {keep} must be 2 or more: the newest may be damaged")


def _check_record(
    name: str, record: AdapterRecord, snapshot: AdapterSnapshot | None, earlier: AdapterEntry | None
) -> None:
    if not NAME_PATTERN.fullmatch(name):
        raise ValueError(f"adapter name: {name!r} must match {NAME_PATTERN.pattern}")
    if snapshot is not None:
        if snapshot.step != record.optimizer_step:
            raise ValueError(
                f"adapters.{name}.optimizer_step: {record.optimizer_step}, its snapshot has "
                f"{snapshot.step}"
            )
    elif earlier is None:
        raise ValueError(f"snapshots: {name!r} has none, and no earlier one")
    elif earlier.record.optimizer_step != record.optimizer_step:
        raise ValueError(
            f"snapshots: {name!r} has none, but moved from optimizer step "
            f"{earlier.record.optimizer_step} to {record.optimizer_step}"
        )
    if earlier is not None and record.version < earlier.record.version:
        raise ValueError(
            f"adapters.{name}.version: {record.version} is below the committed "
            f"{earlier.record.version}"
        )
