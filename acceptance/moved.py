"""What a process moves and holds, from /proc (Linux)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def loopback_bytes() -> int:
    """Sent over the loopback device so far, by anybody on this machine."""
    (line,) = (x for x in Path("/proc/net/dev").read_text().splitlines() if x.strip()[:3] == "lo:")
    return int(line.partition(":")[2].split()[0])


def written_bytes() -> int:
    """Written to files by this process so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(x for x in lines if x.startswith("write_bytes")).split()[1])


def held_bytes(processes: Iterable[int]) -> int:
    """Memory that these processes have for themselves: no files, no code that others map too."""
    total = 0
    for pid in processes:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        total += sum(int(fields[name].split()[0]) << 10 for name in ("RssAnon", "VmSwap"))
    return total


def files(folder: Path) -> set[str]:
    """All files below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
