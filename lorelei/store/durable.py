"""Durable writes: what returned without an error is on the disk, what did not left no trace.

A file or folder is written under a temporary name in its own parent, fsynced, renamed, and the
parent is fsynced; a reader sees the old content or the new, never a part.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Generator, Mapping
from pathlib import Path

TEMPORARY = ".*.tmp"  # glob of temporary names; a crash may leave them, RunStore.open removes them

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_IN_THE_WAY = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR}
_FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}


class StoreError(ValueError):
    """The run folder cannot be used as asked; the message says why and what to do."""


class CorruptFile(StoreError):
    """A file is missing, damaged or not what its name says."""


def write_error(path: Path, error: OSError) -> StoreError:
    """The one line a user reads when a write fails: path, reason, free space, fix."""
    parent = next(p for p in path.absolute().parents if os.path.exists(p))
    free = shutil.disk_usage(parent).free
    if error.errno in _FULL:
        fix = "free some space or move the run to a larger disk"
    elif error.errno in _IN_THE_WAY:
        fix = "move away what is there, or choose another folder"
    elif error.errno in _FORBIDDEN:
        fix = "make the folder writable or choose another one"
    else:
        fix = "check the disk"
    reason = error.strerror or str(error)
    return StoreError(f"{path}: cannot be written: {reason} ({free // 1024} KiB free); {fix}")


@contextlib.contextmanager
def writing(path: Path) -> Generator[None]:
    """Raises StoreError in place of an OSError of the block."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error


def write_file(path: Path, data: bytes) -> None:
    """Replace the content of `path`. Raises StoreError."""
    temporary = _temporary(path)
    try:
        _write(temporary, data)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):  # a read-only filesystem refuses even this
            temporary.unlink()
        raise write_error(path, error) from error


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Create a folder with exactly these files. Raises StoreError; also when it has content."""
    temporary = _temporary(path)
    try:
        make_folder(path.parent)
        temporary.mkdir()
        for name, data in files.items():
            _write(temporary / name, data)
        sync_folder(temporary)
        os.rename(temporary, path)  # refused by the system unless `path` is absent or empty
        sync_folder(path.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if error.errno in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
            raise StoreError(
                f"{path}: exists already; remove it or choose another folder"
            ) from error
        raise write_error(path, error) from error


def make_folder(path: Path) -> None:
    """Create a folder and its parents. Raises StoreError."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with writing(path):
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def delete_file(path: Path) -> None:
    """Delete a file that may be gone already. Raises StoreError."""
    with writing(path):
        path.unlink(missing_ok=True)


def read_file(path: Path) -> bytes:
    """Raises CorruptFile when missing, StoreError when unreadable."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CorruptFile(f"{path}: missing") from None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from error


def sync_folder(path: Path) -> None:
    """fsync a folder: names created, renamed or deleted in it survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _write(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
