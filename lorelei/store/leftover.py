"""What a crash may leave in a run folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from lorelei.store.durable import TEMPORARY
from lorelei.store.manifest import Manifest


def unnamed_snapshots(folder: Path, manifests: Sequence[Manifest]) -> Iterator[Path]:
    """Files in snapshots/ that no manifest names: of retired steps, or staged."""
    named = {folder / path for manifest in manifests for path in manifest.files}
    for path in (folder / "snapshots").rglob("*"):
        if path not in named and path.is_file():
            yield path


def temporary_files(folder: Path) -> Iterator[Path]:
    """Files that were being written, outside snapshots/. Another thread may still write them."""
    for path in folder.rglob(TEMPORARY):
        if path.is_file() and not path.is_relative_to(folder / "snapshots"):
            yield path
