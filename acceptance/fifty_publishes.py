"""50 versions in a row through a server with room for 8: the right one answers, nothing leaks.

More follow, to show where memory goes from there.

usage: python -m acceptance fifty_publishes [CASE ...]
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from acceptance.moved import files, held_bytes
from acceptance.record import Line
from acceptance.reference import Reference
from acceptance.stage import Case, Stage, cases
from acceptance.table import table
from lorelei.types import AdapterRef

CASES = cases("tiny", "smollm2", "tiny-tp2")
CAPACITY = 8
SETTLED, PUBLISHES, LATER = 10, 50, 90  # memory is compared between them
READINGS = 10  # from each of them on, the least counts: a server's buffers come and go
GRAIN = 1_000_000  # bytes: what an allocator keeps or gives back by chance
PROMPT = np.random.default_rng(0).integers(5, 290, 32).astype(np.int32)


async def measure(case: Case, stage: Stage) -> Line:
    """One row."""
    first = stage.version
    expected = _expected(stage)
    before = files(stage.folder)
    live: list[AdapterRef] = []
    errors: list[float] = []
    nearest: list[float] = []
    held: list[int] = []  # bytes, after each publication
    for count in range(1, LATER + READINGS):
        stage.change()
        live.append(await stage.publish())
        # the newest, and one of those that are still kept
        for ref in {live[-1], live[count % len(live)]}:
            (found,) = await stage.rollout.score([PROMPT], ref)
            own, other = _errors(found, ref.version - first, expected)
            errors.append(own)
            nearest.append(other)
        if len(live) == CAPACITY:
            await stage.publisher.retire(live.pop(0))
        held.append(_held(stage))
    for ref in live:
        await stage.publisher.retire(ref)
    left = (await stage.rollout.health()).adapters
    level = {n: min(held[n - 1 : n - 1 + READINGS]) for n in (SETTLED, PUBLISHES, LATER)}
    row = {
        "publishes": len(held),
        "checked": len(errors),
        "largest_error": max(errors),
        "tolerance": stage.size.tolerance,
        "nearest_other": min(nearest),
        "grown_bytes": level[PUBLISHES] - level[SETTLED],
        "grown_later_bytes": level[LATER] - level[PUBLISHES],
        "held_bytes": held,
        "adapter_bytes": sum(t.nbytes for t in stage.state(1).tensors.values()),
        "names_left": len(left),
        "files_left": len(files(stage.folder) - before),
    }
    return row | {"problems": problems(row)}


def _expected(stage: Stage) -> list[NDArray[np.float32]]:
    """[T - 1] of transformers and peft by version, from the next one on; [0]: the base model.

    All of them before anything is published: they need memory of their own.
    """
    reference = Reference(stage)
    versions = range(stage.version + 1, stage.version + LATER + READINGS)
    return [reference.logprobs(version, PROMPT) for version in (0, *versions)]


def _errors(
    found: NDArray[np.float32], number: int, expected: list[NDArray[np.float32]]
) -> tuple[float, float]:
    """Largest difference from its own log-probabilities, and from the nearest other version's."""
    differences = [float(np.abs(found - other).max()) for other in expected]
    own = differences.pop(number)
    return own, min(differences)


def _held(stage: Stage) -> int:
    if os.getpid() in stage.servers:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is free already and only not given back
    return held_bytes(stage.servers)


def problems(row: Line) -> list[str]:
    """What must hold and does not."""
    found: list[str] = []
    if row["largest_error"] > row["tolerance"]:
        found.append(
            f"log-probabilities differ by {row['largest_error']:.1e} from transformers and peft, "
            f"at most {row['tolerance']:.0e} is allowed"
        )
    if row["nearest_other"] <= row["largest_error"]:
        found.append("another version is as near as the right one")
    if (grown := row["grown_bytes"]) >= (allowed := max(2 * row["adapter_bytes"], GRAIN)):
        found.append(
            f"memory grew by {grown / 1e6:.2f} MB in {PUBLISHES - SETTLED} publications, under "
            f"{allowed / 1e6:.2f} are allowed"
        )
    for what in ("names", "files"):
        if left := row[f"{what}_left"]:
            found.append(f"{left} {what} are left")
    return found


COLUMNS = (
    "engine",
    "publisher",
    "model",
    "error",
    "next nearest",
    f"memory {SETTLED} to {PUBLISHES}, MB",
    f"{PUBLISHES} to {LATER}, MB",
    "adapter, MB",
    "names left",
    "files left",
)


def section(found: Mapping[str, Line]) -> str:
    """Its part of docs/acceptance.md."""
    rows = [
        (
            *(CASES[name].engine, CASES[name].publisher, CASES[name].size),
            f"{row['largest_error']:.1e}",
            f"{row['nearest_other']:.1e}",
            f"{row['grown_bytes'] / 1e6:.2f}",
            f"{row['grown_later_bytes'] / 1e6:.2f}",
            f"{row['adapter_bytes'] / 1e6:.2f}",
            *(row["names_left"], row["files_left"]),
        )
        for name, row in found.items()
    ]
    return f"""## {PUBLISHES} versions in a row

{LATER + READINGS - 1} versions with other tensors each are published one after another, at most
{CAPACITY} of them kept; after each one the newest and an older one score {len(PROMPT)} tokens.
*Error* is the largest difference of a log-probability from transformers and peft with that
version's tensors, and *next nearest* the smallest such difference from another version or the base
model. Memory is what the server's processes (for `embedded`, this process) have for themselves, the
least of {READINGS} readings from publication {SETTLED}, {PUBLISHES} and {LATER} on: buffers come
and go. The first column has to stay under two adapters, or {GRAIN / 1e6:g} MB where these are
smaller. Files and names are counted when all versions are retired.

`make acceptance ARGS=fifty_publishes`

{table(COLUMNS, rows)}
"""
