"""What a crash may leave in a run folder, and a run that never began."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from lorelei.store.durable import TEMPORARY
from lorelei.store.log import LOGS
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


def delete_run(folder: Path) -> None:
    """Everything that a run writes but the logs of servers, which errors name.

    And the folder, if nothing is in it then.
    """
    with contextlib.suppress(OSError):
        (folder / "run.json").unlink(missing_ok=True)  # first: now there is no run
        for name in ("incarnation.json", "index.sqlite", *LOGS, "lock"):
            (folder / name).unlink(missing_ok=True)
        for name in ("manifests", "snapshots", "spool"):
            shutil.rmtree(folder / name, ignore_errors=True)
        folder.rmdir()
