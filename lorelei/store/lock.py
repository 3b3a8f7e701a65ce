"""The lock of a run folder: held by the process that writes it, freed by the system at its end."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path

from lorelei.store.durable import StoreError, read_file, writing

PATIENCE = 0.5  # seconds; a reader's test and a dying process hold the lock for a moment


class FolderLock:
    """An exclusive flock on `<folder>/lock`, which holds the owner's process id."""

    def __init__(self, folder: Path) -> None:
        """Raises StoreError naming the process that holds the lock."""
        path = folder / "lock"
        with writing(path):
            self._fd: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        # a forked child shares the lock: it would outlive a killed parent and block the resume
        os.register_at_fork(after_in_child=self.close_copy)
        if not _acquire(self._fd):
            self.close_copy()
            pid = read_file(path).decode(errors="replace").strip() or "unknown"
            raise StoreError(
                f"{folder}: in use by process {pid}; wait for it, stop it or choose another run"
            )
        with contextlib.suppress(OSError):  # a full disk; the id is for people only
            os.ftruncate(self._fd, 0)
            os.write(self._fd, str(os.getpid()).encode())

    def close_copy(self) -> None:
        """Close this process's descriptor; a copy in another process keeps the lock."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def release(self) -> None:
        """Free the folder. Idempotent."""
        if self._fd is not None:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            self.close_copy()


def is_locked(folder: Path) -> bool:
    """Whether a process writes this folder now. Reads only."""
    try:
        fd = os.open(folder / "lock", os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _acquire(fd: int) -> bool:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
