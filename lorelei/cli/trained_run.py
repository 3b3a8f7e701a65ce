"""A run folder as eval, export and chat read it. Imports torch: only inside a command."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorelei.config.run import RunConfig
from lorelei.lora.state import AdapterState
from lorelei.model.locate import find_model
from lorelei.run_file import validate
from lorelei.store.identity import read_identity
from lorelei.store.inputs import Inputs, accepted, differences, read_inputs
from lorelei.store.manifest import Manifest, read_checkpoints
from lorelei.store.run import record_changes
from lorelei.store.snapshot import read_snapshot
from lorelei.types import AdapterRef


def _section(field: str) -> str:
    parts = field.split(".")
    return parts[2] if parts[0] == "adapters" else parts[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedRun:
    """The newest checkpoint of a run that verifies; nothing here writes to the folder."""

    folder: Path
    config: RunConfig
    manifest: Manifest
    inputs: Inputs  # as they were recorded; empty: they were not

    @classmethod
    def read(cls, folder: Path) -> TrainedRun:
        """Raises ValueError when no checkpoint verifies."""
        identity = read_identity(folder)
        found = read_checkpoints(folder, identity.run_id)
        if not found.verified:
            raise ValueError(f"{folder}: it has no checkpoint that verifies; see `lorelei check`")
        config = validate(dict(identity.config))
        return cls(
            folder=folder,
            config=config,
            manifest=found.verified[-1],
            inputs=identity.inputs or {},
        )

    def check_inputs(
        self, command: str, reads: Collection[str], accept: Sequence[str] | None
    ) -> list[str]:
        """Compare the inputs with those that the run was made with.

        reads: the sections whose inputs the command reads. Returns warnings about the others.
        Raises StoreError for a difference that is not accepted; the run records those that are.
        """
        if not self.inputs:
            return []
        found = read_inputs(self.config, find_model(self.config.model))
        read = {f: p for f, p in self.inputs.items() if _section(f) in reads}
        changes = accepted(read, found, accept or (), command)
        if changes:
            record_changes(self.folder, changes)
        others = {f: p for f, p in self.inputs.items() if f not in read}
        return [str(difference) for difference in differences(others, found)]

    def adapter(self, name: str | None) -> str:
        """The adapter of that name, or the only one. Raises ValueError naming the others."""
        there = list(self.manifest.adapters)
        if name is None and len(there) == 1:
            return there[0]
        if name not in there:
            asked = "which one?" if name is None else f"there is no {name!r};"
            raise ValueError(f"adapter: {asked} use --adapter with one of: {', '.join(there)}")
        return name

    def state(self, name: str) -> AdapterState:
        """The adapter's tensors."""
        path = self.manifest.adapters[name].snapshot
        return read_snapshot(self.folder / path, self.manifest.files[path].sha256).state

    def ref(self, name: str, state: AdapterState) -> AdapterRef:
        """The adapter's version under a name for this process."""
        return AdapterRef(
            name=name,
            version=self.manifest.adapters[name].record.version,
            run_id=self.manifest.run,
            digest=state.digest(),
        )
