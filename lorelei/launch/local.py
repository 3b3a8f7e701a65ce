"""Runs a configuration on this machine: builds the parts, starts the loop, ends cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from contextlib import AsyncExitStack
from pathlib import Path

from lorelei import loop as the_loop
from lorelei.config.load import to_plain, validate
from lorelei.config.run import RunConfig
from lorelei.launch.parts import Parts, build, restore
from lorelei.loop import Loop
from lorelei.obs.console import Console
from lorelei.obs.history import read_metrics
from lorelei.store.run import RunStore


class Stopped(Exception):
    """The run was told to stop; it is saved. `signal` says by what."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal = signal_number


def train(config: RunConfig) -> None:
    """Start a new run. Raises ValueError before anything heavy, Stopped after a signal."""
    folder = Path(config.runs_dir) / config.name
    if (folder / "run.json").exists():
        raise ValueError(
            f"name: {str(folder)!r} holds a run already; go on with `lorelei resume {folder}`, "
            "or choose another with name=..."
        )
    asyncio.run(_main(config, folder, new=True))


def resume(folder: Path) -> None:
    """Go on with a run from its last committed step."""
    from lorelei.store.identity import read_identity

    config = validate(dict(read_identity(folder).config))
    asyncio.run(_main(config, folder, new=False))


async def _main(config: RunConfig, folder: Path, new: bool) -> None:
    async with AsyncExitStack() as stack:
        parts = await build(config, stack)
        keep = config.checkpoint.keep
        if new:
            store = RunStore.create(folder, to_plain(config), keep=keep)
        else:
            store = RunStore.open(folder, keep=keep)
        stack.callback(store.close)
        steps = {e.name: e.steps for e in config.experiments()}
        console = stack.enter_context(Console(steps))
        for warning in store.warnings:
            console.warn(warning)
        loop = restore(config, parts, store, console)
        stack.push_async_callback(loop.collector.close)
        console.resumed(read_metrics(folder / "metrics.jsonl"))
        console.started(_opening(config, parts, folder, loop))
        stopped = await _run(loop)
        finished = all(lane.done for lane in loop.lanes.values())
        console.finished(_closing(loop, folder, finished))
        if stopped is not None and not finished:
            raise Stopped(stopped)


async def _run(loop: Loop) -> int | None:
    """Run to the end or to the first signal, which is returned; a second one kills."""
    received: list[int] = []
    events = asyncio.get_running_loop()

    def stop(number: int) -> None:
        received.append(number)
        events.remove_signal_handler(number)
        loop.console.note("stopping after this step; a second signal stops at once")
        loop.collector.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        events.add_signal_handler(number, stop, number)
    try:
        await the_loop.begin(loop)
        await the_loop.run(loop)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):
                events.remove_signal_handler(number)
    return received[0] if received else None


def _opening(config: RunConfig, parts: Parts, folder: Path, loop: Loop) -> list[str]:
    model = f"{config.model} ({config.dtype}, {parts.device})"
    engines = f"{config.train.kind} + {config.rollout.kind}"
    lines = [f"{folder}: {model}, {engines}"]
    if loop.store.latest is not None:
        lines.append(f"resuming after step {loop.step}")
    for e in config.experiments():
        lora = e.lora
        lines.append(
            f"  {e.name}: {e.algo.kind} on {parts.tasks[e.name]}, rank {lora.lora_rank}, "
            f"{e.algo.batch_size} prompts x {e.rollout.n_samples} samples, {e.steps} steps"
        )
    return lines


def _closing(loop: Loop, folder: Path, finished: bool) -> list[str]:
    if not finished:
        return [f"saved after step {loop.step}; go on with: lorelei resume {folder}"]
    return [
        f"done: {folder}",
        f"  look:   lorelei report {folder}    lorelei samples {folder}",
        f"  use:    lorelei export {folder}    lorelei chat {folder}",
    ]
