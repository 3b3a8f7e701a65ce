"""50 versions in a row through a server with room for 8: the right one answers, nothing leaks.

40 more follow, to tell what a server keeps of every version from what it needs once.

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
from acceptance.stage import Case, Stage, cases, staged
from acceptance.table import table
from lorelei.types import AdapterRef

CASES = cases("tiny", "smollm2")
SETTLED, PUBLISHES, LATER = 10, 50, 90  # memory is compared between them
CAPACITY = 8
READING = 10  # publications between two readings of the memory
PROMPT = np.random.default_rng(0).integers(5, 290, 32).astype(np.int32)


async def measure(case: Case) -> Line:
    """One row."""
    async with staged(case, CAPACITY) as stage:
        expected = _expected(stage)
        before = files(stage.folder)
        live: list[AdapterRef] = []
        errors: list[float] = []
        nearest: list[float] = []
        held: dict[int, int] = {}  # bytes, by publications
        for count in range(1, LATER + 1):
            stage.change()
            live.append(await stage.publish())
            # the newest, and one of those that are still kept
            for ref in {live[-1], live[count % len(live)]}:
                own_error, other_error = await _errors(stage, ref, expected)
                errors.append(own_error)
                nearest.append(other_error)
            if len(live) == CAPACITY:
                await stage.publisher.retire(live.pop(0))
            if count % READING == 0:
                held[count] = _held(stage)
        for ref in live:
            await stage.publisher.retire(ref)
        left = (await stage.rollout.health()).adapters
        row = {
            "publishes": LATER,
            "checked": len(errors),
            "largest_error": max(errors),
            "tolerance": stage.size.tolerance,
            "nearest_other": min(nearest),
            "grown_bytes": held[PUBLISHES] - held[SETTLED],
            "grown_later_bytes": held[LATER] - held[PUBLISHES],
            "held_bytes": list(held.values()),
            "adapter_bytes": sum(t.nbytes for t in stage.state(1).tensors.values()),
            "names_left": len(left),
            "files_left": len(files(stage.folder) - before),
        }
    return row | {"problems": problems(row)}


def _expected(stage: Stage) -> list[NDArray[np.float32]]:
    """[T - 1] by version, of transformers and peft; [0]: the base model.

    All of them before anything is published: they need memory of their own.
    """
    reference = Reference(stage)
    return [reference.logprobs(version, PROMPT) for version in range(LATER + 1)]


async def _errors(
    stage: Stage, ref: AdapterRef, expected: list[NDArray[np.float32]]
) -> tuple[float, float]:
    """Largest difference from its own log-probabilities, and from the nearest other version's."""
    (found,) = await stage.rollout.score([PROMPT], ref)
    differences = [float(np.abs(found - other).max()) for other in expected]
    own = differences.pop(ref.version)
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
    if row["grown_bytes"] >= 2 * row["adapter_bytes"]:
        found.append(
            f"memory grew by {row['grown_bytes'] / row['adapter_bytes']:.1f} adapters between "
            f"publication {SETTLED} and {PUBLISHES}, under 2 are allowed"
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

{LATER} versions with other tensors each are published one after another, at most {CAPACITY} of
them kept; after each one the newest and an older one score {len(PROMPT)} tokens. *Error* is the
largest difference of a log-probability from transformers and peft with that version's tensors, and
*next nearest* the smallest such difference from another version or the base model. Memory is the
growth of what the server's processes (for `embedded`, this process) have for themselves, from
publication {SETTLED} to {PUBLISHES} and from {PUBLISHES} to {LATER}. Files and names are counted
when all versions are retired.

`make acceptance ARGS=fifty_publishes`

{table(COLUMNS, rows)}
"""
