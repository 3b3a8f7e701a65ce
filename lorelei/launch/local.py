"""Runs a configuration on this machine: builds the parts, starts the loop, ends cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Generator, Mapping
from contextlib import AsyncExitStack, closing
from pathlib import Path

from lorelei import loop as the_loop
from lorelei.config.run import RunConfig
from lorelei.inference.contract import EngineClosed
from lorelei.inference.server.client import ServerTrouble
from lorelei.launch.assemble import RunComponents, build, make_loop, make_thread, warm_starts
from lorelei.loop import Loop
from lorelei.lora.state import AdapterSnapshot
from lorelei.obs.console import Console
from lorelei.obs.history import read_metrics
from lorelei.publish.contract import PublishError
from lorelei.publish.page import CanaryFailed
from lorelei.run_file import to_plain, validate
from lorelei.store.identity import read_identity
from lorelei.store.run import RunStore
from lorelei.train.contract import EngineFailed, TrainEngine
from lorelei.train.remote.restarting import Restarting


class Broken(ValueError):
    """An engine or the way between them failed; the run is saved up to its last step."""


class Stopped(Exception):
    """The run was told to stop; it is saved. `signal` says by what."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal = signal_number


def train(config: RunConfig) -> None:
    """Start a new run. Raises ValueError for a user-fixable error, Stopped after a signal."""
    asyncio.run(_main(config, Path(config.runs_dir) / config.name, None))


def resume(folder: Path) -> None:
    """Go on with a run from its last committed step. Raises like `train`."""
    config = validate(dict(read_identity(folder).config))
    with closing(RunStore.open(folder, keep=config.checkpoint.keep)) as store:
        if store.latest is not None and store.latest.state["finished"]:
            console = Console({})
            console.note(f"finished already, after step {store.latest.step}")
            console.finished(_closing(store, finished=True))
            return
        asyncio.run(_main(config, folder, store))


async def _main(config: RunConfig, folder: Path, store: RunStore | None) -> None:
    async with AsyncExitStack() as stack:
        if store is None or store.latest is None:
            starts, origin = warm_starts(config), "lora.init_from"
        else:
            known = {e.name for e in config.experiments()} & store.latest.adapters.keys()
            starts, origin = {name: store.load(name) for name in sorted(known)}, str(folder)
        try:
            parts = await build(config, stack, folder / "logs")
        except (EngineClosed, ServerTrouble) as error:  # of servers that do not start
            raise Broken(str(error)) from error
        thread = make_thread(config, parts, stack, store)
        _restore(thread.engine, starts, origin)
        if store is None:  # last: what is refused before leaves nothing behind
            store = RunStore.create(folder, to_plain(config), keep=config.checkpoint.keep)
            stack.callback(store.close)
        console = stack.enter_context(
            closing(Console({e.name: e.steps for e in config.experiments()}))
        )
        if isinstance(thread.engine, Restarting):
            thread.engine.tell = console.warn
        loop = make_loop(config, parts, thread, store, console)
        stack.push_async_callback(loop.publisher.close)
        for job in loop.registry:
            stack.push_async_callback(job.close)
        console.resumed(read_metrics(folder / "metrics.jsonl"))
        console.started(_opening(config, parts, loop))
        try:
            with _stopping_on_signals(loop) as received:
                await the_loop.begin(loop)
                await the_loop.run(loop)
        except (ValueError, EngineClosed, EngineFailed, PublishError, ServerTrouble) as error:
            if isinstance(error, CanaryFailed):
                console.page(error.page)
            if store.latest is None:  # what could not begin leaves nothing behind
                store.discard()
            else:
                console.finished(_closing(store, finished=False))
            raise error if isinstance(error, ValueError) else Broken(str(error)) from error
        finished = loop.registry.finished
        console.finished(_closing(store, finished))
        if received and not finished:
            raise Stopped(received[0])


def _restore(engine: TrainEngine, starts: Mapping[str, AdapterSnapshot], origin: str) -> None:
    for name, snapshot in starts.items():
        try:
            engine.restore(name, snapshot)
        except ValueError as error:  # of another base model, or for other targets
            raise ValueError(f"{origin}: {error}") from error


@contextlib.contextmanager
def _stopping_on_signals(loop: Loop) -> Generator[list[int]]:
    """The first signal lets the loop end after its step, and is in the list; a second one kills."""
    received: list[int] = []
    events = asyncio.get_running_loop()

    def stop(number: int) -> None:
        received.append(number)
        events.remove_signal_handler(number)
        loop.console.note("stopping after this step; a second signal stops at once")
        loop.registry.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        events.add_signal_handler(number, stop, number)
    try:
        yield received
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):
                events.remove_signal_handler(number)


def _opening(config: RunConfig, parts: RunComponents, loop: Loop) -> list[str]:
    model = f"{config.model} ({config.dtype}, {parts.device})"
    engines = f"{config.train.kind} + {config.rollout.kind}"
    lines = [f"{loop.store.folder}: {model}, {engines}"]
    if loop.store.latest is not None:
        lines.append(f"resuming after step {loop.step}")
    for e in config.experiments():
        trained = f"rank {e.lora.lora_rank}" if e.lora.use_lora else "all weights"
        samples = f"prompts x {e.rollout.n_samples} samples" if e.samples else "rows"
        batch = f"{e.algo.batch_size} {samples}"
        task = e.task.title if e.task.kind == "reasoning_gym" else e.task.path
        lines.append(f"  {e.name}: {e.algo.kind} on {task}, {trained}, {batch}, {e.steps} steps")
    return lines


def _closing(store: RunStore, finished: bool) -> list[str]:
    folder = store.folder
    if not finished:
        assert store.latest is not None
        return [f"saved after step {store.latest.step}; go on with: lorelei resume {folder}"]
    return [
        f"done: {folder}",
        f"  look:   lorelei report {folder}    lorelei samples {folder}",
        f"  use:    lorelei export {folder}    lorelei chat {folder}",
    ]
