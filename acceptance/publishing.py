"""Engine x publisher: how long until a version is visible, and what that costs generation.

usage: python -m acceptance publishing [CASE ...]
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from statistics import median

import numpy as np

from acceptance.moved import loopback_bytes, written_bytes
from acceptance.record import Line
from acceptance.stage import SIZES, Case, Stage, cases
from acceptance.table import table
from acceptance.traffic import LANES, TokenClock, Traffic, Window, gaps, meets, rate
from lorelei.types import AdapterRef, GenerateRequest, SamplingParams

CASES = cases("tiny", "smollm2")
IDLE, PUBLISHES = 3, 20
_WAITS = ("visible_ms", "first_token_ms")
LIVE = 4  # versions at most
READING = {"embedded": 0.001, "vllm": 0.01, "sglang": 0.01}  # seconds between two


async def measure(case: Case, stage: Stage) -> Line:
    """One row."""
    moved, first = await _idle(stage)
    windows: list[Window] = []
    calm: list[float] = []  # when a token was asked for with nothing published before
    tokens_after: list[float] = []
    retiring: list[asyncio.Task[None]] = []
    async with (
        Traffic(stage.rollout, first, stage.size.answer) as traffic,
        TokenClock(stage.rollout, READING[case.engine]) as clock,
    ):
        while traffic.finished < LANES:  # what is compiled or cached at first
            await asyncio.sleep(0.05)
            traffic.check()
        started = time.perf_counter()
        for _ in range(PUBLISHES):
            await asyncio.to_thread(stage.change)  # a trainer has a thread of its own
            await _quiet(windows, retiring)
            calm.append(time.perf_counter())
            # prompts that have come are read before, others once it is clear what this one cost
            traffic.admits.clear()
            await stage.rollout.generate(_one_token(traffic.ref))
            start = time.perf_counter()
            ref = await stage.publish()
            windows.append((start, time.perf_counter()))
            await _next_token(clock, traffic)
            old, traffic.ref = traffic.ref, ref
            traffic.admits.set()
            retiring.append(asyncio.create_task(stage.publisher.retire(old)))
            await stage.rollout.generate(_one_token(ref))
            tokens_after.append(time.perf_counter() - start)
            traffic.check()
        await _quiet(windows, [])
        ended = time.perf_counter()
    await asyncio.gather(*retiring)
    await stage.publisher.retire(traffic.ref)
    row = summary(clock.times, clock.counts, windows, calm, (started, ended))
    row |= {**moved, "first_token_ms": _percentiles(tokens_after), "aborted": traffic.aborted}
    return row | {"problems": problems(row)}


async def _idle(stage: Stage) -> tuple[Line, AdapterRef]:
    """The bytes of a publication while nothing else goes on; the smallest of some."""
    network: list[int] = []
    disk: list[int] = []
    ref: AdapterRef | None = None
    for _ in range(IDLE):
        stage.change()
        before = loopback_bytes(), written_bytes()
        new = await stage.publish()
        network.append(loopback_bytes() - before[0])
        disk.append(written_bytes() - before[1])
        if ref is not None:
            await stage.publisher.retire(ref)
        ref = new
    assert ref is not None
    tensors = stage.state(stage.version).tensors.values()
    size = sum(tensor.nbytes for tensor in tensors)
    return {"adapter_bytes": size, "network_bytes": min(network), "file_bytes": min(disk)}, ref


async def _quiet(windows: list[Window], retiring: list[asyncio.Task[None]]) -> None:
    """As long as a publication, to compare with; longer when old versions are still in use."""
    last = windows[-1][1] - windows[-1][0] if windows else 0.0
    await asyncio.sleep(max(0.5, 2 * last))
    while sum(not task.done() for task in retiring) >= LIVE - 1:
        await asyncio.sleep(0.02)


async def _next_token(clock: TokenClock, traffic: Traffic) -> None:
    """Until a reading finds new tokens of the requests that run."""
    seen = clock.counts[-1]
    while clock.counts[-1] == seen and traffic.running:
        await asyncio.sleep(0.001)
    traffic.check()


def _one_token(ref: AdapterRef) -> GenerateRequest:
    return GenerateRequest(
        tokens=np.arange(5, 29, dtype=np.int32),
        adapter=ref,
        sampling=SamplingParams(max_new_tokens=1),
        key="first",
    )


def summary(
    times: list[float],
    counts: list[int],
    windows: list[Window],
    calm: list[float],
    whole: Window,
) -> Line:
    """Rates and gaps within the windows of publications and between them.

    calm: the ends of stretches before the windows, to compare with: nothing is published in them,
    but prompts are read.
    """
    edges = [whole[0], *(edge for window in windows for edge in window), whole[1]]
    between = list(zip(edges[::2], edges[1::2], strict=True))
    spans = [gap for gap in gaps(times, counts) if meets(gap, whole)]
    quiet = [gap for gap in spans if not any(meets(gap, window) for window in windows)]
    step = median(b - a for a, b in quiet)

    def longest(some: list[Window], window: Window) -> float:
        return max((b - a for a, b in some if meets((a, b), window)), default=0.0)

    def bounded(some: list[Window], among: list[Window]) -> int:
        limits = (2 * step + load for load in loads)
        return sum(longest(some, w) <= limit for w, limit in zip(among, limits, strict=True))

    loads = [end - start for start, end in windows]
    before = [(end - load, end) for end, load in zip(calm, loads, strict=True)]
    return {
        "publishes": len(windows),
        "visible_ms": _percentiles(loads),
        "tokens_per_s": {
            "between": round(rate(times, counts, between), 1),
            "publishing": round(rate(times, counts, windows), 1),
        },
        "step_ms": _ms(step),
        "longest_gap_ms": {
            "between": _ms(max(b - a for a, b in quiet)),
            "publishing": _ms(max(longest(spans, window) for window in windows)),
        },
        "within_bound": bounded(spans, windows),
        "within_bound_before": bounded(quiet, before),
        "reading_ms": _ms(median(np.diff(times).tolist())),
    }


def problems(row: Line) -> list[str]:
    """What must hold and does not."""
    found: list[str] = []
    if row["aborted"]:
        found.append(f"{row['aborted']} requests were aborted")
    if late := row["publishes"] - row["within_bound"]:
        found.append(
            f"{late} of {row['publishes']} publications held tokens up for longer than twice the "
            "median step plus the load"
        )
    return found


def _percentiles(seconds: list[float]) -> dict[str, float]:
    return {f"p{p}": _ms(float(np.percentile(seconds, p))) for p in (50, 95)}


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 1)


COLUMNS = (
    "engine",
    "publisher",
    "model",
    "visible, ms p50 / p95",
    "first token, ms p50 / p95",
    "adapter, MB",
    "network, MB",
    "files, MB",
    "tokens/s",
    "lost",
    "step, ms",
    "longest gap, ms",
    "while publishing, ms",
    "too long",
    "before",
    "aborted",
)


def section(found: Mapping[str, Line]) -> str:
    """Its part of docs/acceptance.md."""
    return f"""## Publishing while tokens are sampled

A new adapter version is published {PUBLISHES} times while {LANES} requests are in flight at any
time, of {SIZES["tiny"].answer} tokens on average for `tiny` and {SIZES["smollm2"].answer} for
`smollm2`. `tiny` has two layers of width 64 and an adapter of rank 8; `smollm2` is SmolLM2-135M
with rank 16; all linear layers, fp32. *Visible* is the time until `publish` returns, with the
version on every server; *first token* until one token of it was sampled. Bytes are what
went over the loopback device and into files when nothing else was going on; `memory` copies within
the process. *Lost* is tokens a second between publications less those during one. A step is the
median time between readings of the engine's counter that found new tokens; the longest gap is
given between publications and during them. *Too long* are the publications in which one was longer
than twice the step plus the publication itself. Reading a prompt holds tokens up as well: prompts
that have come are read before a publication begins, and those that come meanwhile wait until tokens
have followed it. *Before* shows what they cost: of the stretches before the publications, each as
long as its own, those in which a gap was too long although nothing was published. So *lost* may
be below zero: no prompts are read while publishing. Trainer and server share the cores.

`make acceptance ARGS=publishing`

{table(COLUMNS, [_cells(CASES[name], row) for name, row in found.items()])}
"""


def _cells(case: Case, row: Line) -> tuple[object, ...]:
    speed, gap = row["tokens_per_s"], row["longest_gap_ms"]
    lost = speed["between"] - speed["publishing"]
    return (
        *(case.engine, case.publisher, case.size),
        *(f"{row[what]['p50']:.0f} / {row[what]['p95']:.0f}" for what in _WAITS),
        *(f"{row[what] / 1e6:.2f}" for what in ("adapter_bytes", "network_bytes", "file_bytes")),
        f"{speed['between']:.0f}",
        f"{lost:.0f} ({lost / speed['between']:.0%})",
        f"{row['step_ms']:.0f}",
        f"{gap['between']:.0f}",
        f"{gap['publishing']:.0f}",
        row["publishes"] - row["within_bound"],
        row["publishes"] - row["within_bound_before"],
        row["aborted"],
    )
