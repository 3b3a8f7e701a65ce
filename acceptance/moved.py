"""What a process moves and holds, from /proc (Linux)."""

from __future__ import annotations

from pathlib import Path

import psutil


def loopback_bytes() -> int:
    """Sent over the loopback device so far, by anybody on this machine."""
    (line,) = (x for x in Path("/proc/net/dev").read_text().splitlines() if x.strip()[:3] == "lo:")
    return int(line.partition(":")[2].split()[0])


def written_bytes() -> int:
    """Written to files by this process so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(x for x in lines if x.startswith("write_bytes")).split()[1])


def held_bytes(own: bool) -> int:
    """Memory of the processes started from here, shared pages divided; own: this one too."""
    me = psutil.Process()
    total = 0
    for process in [*me.children(recursive=True), *([me] if own else [])]:
        try:
            total += process.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
    return total


def files(folder: Path) -> set[str]:
    """All files below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
