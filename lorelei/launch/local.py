"""Runs a configuration on this machine: builds the parts, starts the loop, ends cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Generator, Mapping, Sequence
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

from lorelei import loop as the_loop
from lorelei.config.run import RunConfig
from lorelei.inference.contract import EngineClosed
from lorelei.inference.server.client import ServerTrouble
from lorelei.launch.amend import amend, check_steps
from lorelei.launch.assemble import RunComponents, build, make_loop, make_thread, warm_starts
from lorelei.launch.frozen import hold_all, read_frozen
from lorelei.launch.jobs import Problems
from lorelei.launch.warm_start import check_warm_starts
from lorelei.loop import Loop
from lorelei.lora.state import AdapterSnapshot
from lorelei.model.locate import resolve_model
from lorelei.model.turn_end import turn_end
from lorelei.obs.console import Console
from lorelei.obs.history import read_metrics
from lorelei.publish.contract import PublishError
from lorelei.publish.page import CanaryFailed
from lorelei.run_file import to_plain
from lorelei.store.change import Change
from lorelei.store.identity import read_identity
from lorelei.store.inputs import Inputs, accepted, read_inputs
from lorelei.store.manifest import is_finished
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Start:
    """What a run starts or goes on with, beside its configuration."""

    store: RunStore | None = None  # None: it is new
    inputs: Inputs | None = None  # None: not recorded yet
    changes: Sequence[Change] = ()
    notes: Sequence[str] = ()
    warnings: Sequence[str] = ()


def train(config: RunConfig, accept: Sequence[str] = ()) -> None:
    """Start a new run. Raises ValueError for a user-fixable error, Stopped after a signal.

    accept: fields such as lora.init_from that may name an adapter of another base model.
    """
    found = check_warm_starts(config, accept)
    start = _Start(changes=found.changes, warnings=found.warnings)
    asyncio.run(_main(config, Path(config.runs_dir) / config.name, start))


def resume(folder: Path, overrides: Sequence[str] = (), accept: Sequence[str] = ()) -> None:
    """Go on with a run from its last committed step. Raises like `train`.

    overrides: of fields that may change, see `amend`. accept: inputs that may have changed.
    """
    amended = amend(read_identity(folder).config, overrides)
    config = amended.config
    with closing(RunStore.open(folder, keep=config.checkpoint.keep)) as store:
        notes = [*amended.notes, *check_steps(amended, store.latest)]
        if store.latest is not None and is_finished(store.latest, to_plain(config)):
            if amended.changes:
                store.change(amended.changes, config=to_plain(config))
            console = Console({})
            for note in (*notes, f"finished already, after step {store.latest.step}"):
                console.note(note)
            console.finished(_closing(store, finished=True))
            return
        recorded = store.identity.inputs
        start = _Start(store=store, changes=amended.changes, notes=notes)
        if recorded is not None:
            found = read_inputs(config, resolve_model(config.model))
            changes = accepted(recorded, found, accept, "resume")
            kept = {c.field: c.after for c in changes}
            inputs = {f: kept.get(f) or recorded.get(f) or found[f] for f in found}
            start = replace(start, inputs=inputs, changes=[*start.changes, *changes])
        asyncio.run(_main(config, folder, start))


async def _main(config: RunConfig, folder: Path, start: _Start) -> None:
    async with AsyncExitStack() as stack:
        store, notes = start.store, list(start.notes)
        if store is None or store.latest is None:
            starts, origin = warm_starts(config), "lora.init_from"
        else:
            known = {e.name for e in config.experiments()} & store.latest.adapters.keys()
            starts, origin = {name: store.load(name) for name in sorted(known)}, str(folder)
        frozen = read_frozen(config)
        try:
            parts = await build(config, stack, folder / "logs")
        except (EngineClosed, ServerTrouble) as error:  # of servers that do not start
            raise Broken(str(error)) from error
        thread = make_thread(config, parts, stack, store)
        _restore(thread.engine, starts, origin)
        hold_all(thread.engine, frozen)
        # not before: a data set of the hub is of the revision that was just read
        inputs = start.inputs or read_inputs(config, parts.folder)
        if store is None:  # last: what is refused before leaves nothing behind
            keep = config.checkpoint.keep
            store = RunStore.create(folder, to_plain(config), keep=keep, inputs=inputs)
            stack.callback(store.close)
        elif start.inputs is None:
            notes.append(
                f"recorded what this run is made of, which its version of lorelei did not: "
                f"{', '.join(f for f, parts in inputs.items() if parts)}; changes are seen from now"
            )
        store.change(start.changes, config=to_plain(config), inputs=inputs)
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
        console.started([*_opening(config, parts, loop), *notes])
        for warning in start.warnings:
            console.warn(warning)
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
    if (end := turn_end(parts.folder)) is not None and not end.named:
        lines.append(f"  {end.line}")
    for e in config.experiments():
        trained = f"rank {e.lora.lora_rank}" if e.lora.use_lora else "all weights"
        samples = f"prompts x {e.rollout.n_samples} samples" if e.samples else "rows"
        batch = f"{e.algo.batch_size} {samples}"
        task = e.task.title if e.task.kind == "reasoning_gym" else e.task.path
        lines.append(f"  {e.name}: {e.algo.kind} on {task}, {trained}, {batch}, {e.steps} steps")
        data = parts.data[e.name]
        notes = data.source.notes if isinstance(data, Problems) else data.notes
        lines += [f"    {note}" for note in notes]
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
