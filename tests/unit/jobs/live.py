"""A loop that runs without jobs at first, on a tiny model: tests add them."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import numpy as np

from lorelei import loop as the_loop
from lorelei.inference.embedded.engine import EmbeddedEngine
from lorelei.jobs.driven import DrivenJob
from lorelei.jobs.registry import Registry
from lorelei.loop import Loop
from lorelei.obs.console import Console
from lorelei.publish.canary import Canary, Watched
from lorelei.publish.publisher import VersionPublisher
from lorelei.store.run import RunStore
from lorelei.train.archon.engine import archon_engine
from lorelei.train.batch import example_batch
from lorelei.train.engine_thread import EngineThread
from lorelei.train.work import Round
from lorelei.types import AdamHyper, AdapterSpec, Example, LossSpec
from tests.decoders import load_decoder

SFT = LossSpec(path="lorelei.algo.sft:loss", params={})
SPEC = AdapterSpec(rank=2, alpha=4, target_modules=("q_proj", "down_proj"))


@asynccontextmanager
async def live_loop(model: Path, folder: Path) -> AsyncIterator[Loop]:
    """A running loop on a run folder, new or opened again; stopped at the end."""
    async with AsyncExitStack() as stack:
        if (folder / "run.json").exists():
            store = RunStore.open(folder)
        else:
            store = RunStore.create(folder, {"model": "tiny"})
        stack.callback(store.close)
        decoder = load_decoder(model)
        thread = EngineThread(archon_engine(decoder))
        stack.callback(thread.close)
        engine = EmbeddedEngine(decoder)
        stack.push_async_callback(engine.close)
        publisher = VersionPublisher(engine, store.run_id)
        latest = store.latest
        loop = Loop(
            registry=Registry(stays_open=True),
            thread=thread,
            publisher=publisher,
            canary=Canary(thread, engine, publisher, store.run_id),
            store=store,
            console=Console({}, io.StringIO()),
            checkpoint_every=1,
            gauges=lambda _: {},
            step=latest.step if latest else 0,
            resting={n: e.record for n, e in latest.adapters.items()} if latest else {},
        )
        running = asyncio.create_task(the_loop.run(loop))
        yield loop
        loop.registry.stop()
        await running


def driven(name: str, seed: int = 0) -> DrivenJob:
    """A job whose adapter the canary watches."""
    tokens = np.array([5, 17, 200, 42], dtype=np.int32)
    watched = Watched(spec=SPEC, temperature=1.0, sequences=(tokens,))
    return DrivenJob(name, SPEC, seed, watched)


def example_round(name: str, tokens: list[int], lr: float | None = 1e-2) -> Round:
    """All tokens but the first of one sequence are learnt; lr None: no optimizer step."""
    example = Example(
        id="0", tokens=np.array(tokens, dtype=np.int32), predicted=np.ones(len(tokens), np.bool_)
    )
    step = None if lr is None else AdamHyper(lr=lr)
    return Round(batch=example_batch(name, [example]), loss=SFT, step=step)
