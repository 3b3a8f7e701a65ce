"""The cache folder, and what stands in for it where it cannot be written. No torch."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

_LOG = logging.getLogger(__name__)


def cache_folder() -> Path:
    """LORELEI_CACHE, else lorelei/ in XDG_CACHE_HOME or ~/.cache. It may not exist."""
    if named := os.environ.get("LORELEI_CACHE"):
        return Path(os.path.expanduser(named))
    # os.path: a user without a home folder (a container's) is no error
    user = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if user.startswith("~"):
        return _temporary_cache("there is no home folder")
    return Path(user) / "lorelei"


def writable_cache(name: str) -> Path:
    """A folder of the cache that can be written now, else a temporary one, with a warning."""
    folder = cache_folder() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # a write: a full disk has room for an empty file
        with tempfile.NamedTemporaryFile(dir=folder) as probe:
            probe.write(bytes(4096))
    except OSError as error:
        folder = _temporary_cache(f"{folder}: {error.strerror}") / name
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def warn(text: str) -> None:
    """One line on stderr: what is missing is optional. Of a group of workers, the first speaks."""
    if os.environ.get("RANK", "0") == "0":
        _LOG.warning("warning: %s", text)


@cache
def _temporary_cache(reason: str) -> Path:
    """This process's own: a name that others know could hold their code."""
    folder = Path(tempfile.mkdtemp(prefix="lorelei-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    warn(f"LORELEI_CACHE: {reason}; {folder} stands in until the end, name a folder to write to")
    return folder
