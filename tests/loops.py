"""The loop of a run, built as `lorelei train` or `lorelei resume` does, for tests to look into."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorelei import loop as the_loop
from lorelei.inference.contract import InferenceEngine
from lorelei.jobs.rl import RlJob
from lorelei.launch.assemble import RunComponents, build, make_loop, make_thread
from lorelei.loop import Loop
from lorelei.obs.console import Console
from lorelei.run_file import load_config, to_plain
from lorelei.store.run import RunStore
from lorelei.train.step import run_works
from lorelei.train.work import Work


@asynccontextmanager
async def open_loop(
    path: Path, folder: Path, engine: Callable[[RunComponents], InferenceEngine] | None = None
) -> AsyncIterator[Loop]:
    """The loop of a new run of this configuration in `folder`, or of the one that is there.

    engine: makes the inference engine instead; who calls closes it. No task may be left at the end.
    """
    before = asyncio.all_tasks()
    config = load_config(path)
    async with AsyncExitStack() as stack:
        if (folder / "run.json").exists():
            store = RunStore.open(folder)
        else:
            store = RunStore.create(folder, to_plain(config))
        stack.callback(store.close)
        parts = await build(config, stack, folder / "logs")
        if engine is not None:
            parts = replace(parts, sampler=replace(parts.sampler, engine=engine(parts)))
        thread = make_thread(config, parts, stack, store)
        for name in store.latest.adapters if store.latest else ():
            thread.engine.restore(name, store.load(name))
        console = Console({e.name: e.steps for e in config.experiments()}, io.StringIO())
        loop = make_loop(config, parts, thread, store, console)
        stack.push_async_callback(loop.publisher.close)
        for job in loop.registry:
            stack.push_async_callback(job.close)
        yield loop
    if left := asyncio.all_tasks() - before:  # what was just cancelled or closed ends by itself
        await asyncio.wait(left, timeout=5)
    assert asyncio.all_tasks() <= before


async def whole(loop: Loop) -> Loop:
    """Run to the end."""
    await the_loop.begin(loop)
    await the_loop.run(loop)
    return loop


def digest(loop: Loop, name: str = "default") -> str:
    """Of the adapter as the train engine has it."""
    return loop.engine.adapter_state(name).digest()


def versions(loop: Loop) -> dict[str, int]:
    """The version of every adapter that has a job."""
    return {job.name: job.version for job in loop.registry}


def rl(loop: Loop, name: str = "default") -> RlJob:
    """The job of an adapter, which is of this kind."""
    job = loop.registry[name]
    assert isinstance(job, RlJob)
    return job


def before_training(loop: Loop, call: Callable[[Sequence[Work]], None]) -> None:
    """Call a function with the works of every step, just before it trains on them."""
    real = loop.thread.call

    async def watched(function: Callable[..., Any], *args: Any) -> Any:
        if function is run_works:
            call(args[1])
        return await real(function, *args)

    loop.thread.call = watched  # type: ignore[method-assign]
