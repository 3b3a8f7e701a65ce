"""Jobs that come and go while the loop runs."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorelei import loop as the_loop
from lorelei.jobs.driven import DrivenJob
from lorelei.jobs.job import JobFailed
from lorelei.loop import Loop
from lorelei.store.check import check_run
from lorelei.train.work import Result
from lorelei.types import LossSpec
from tests.tiny_models import make_tiny
from tests.unit.jobs.live import driven, example_round, live_loop

T = TypeVar("T")
NAMES = ("a", "b", "c")
SENTENCE = [5, 17, 200, 42, 8, 9]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


class Running:
    """A live loop on an event loop of its own, which many examples share."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.folder = folder
        self._events = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._events.run_forever)
        self._thread.start()
        self._context = live_loop(model, folder)
        self.loop: Loop = self.run(self._context.__aenter__)

    def run(self, function: Callable[..., Awaitable[T]], *args: object) -> T:
        async def body() -> T:
            return await function(*args)

        return asyncio.run_coroutine_threadsafe(body(), self._events).result(30)

    def close(self) -> None:
        self.run(self._context.__aexit__, None, None, None)
        self._events.call_soon_threadsafe(self._events.stop)
        self._thread.join()


@pytest.fixture(scope="module")
def running(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = Running(model, tmp_path_factory.mktemp("runs") / "live")
    # what the model and the engines make once, when they are first used
    running.run(live_through, running.loop, [("add", "a"), ("train and publish", "a")])
    yield running
    running.close()
    assert check_run(running.folder) == []


async def served(loop: Loop) -> set[str]:
    assert loop.canary is not None
    await asyncio.gather(*loop.retiring)
    return set((await loop.canary._engine.health()).adapters)


async def held(loop: Loop) -> list[str]:
    """The adapters of the train engine, sorted; with the tensors of each it would not be empty."""
    bank = loop.thread.engine._bank  # type: ignore[attr-defined]
    return sorted(await loop.thread.call(list, bank))


async def assert_consistent(loop: Loop, jobs: dict[str, DrivenJob]) -> None:
    """Train engine, inference engine, registry and checkpoint have the same adapters."""
    async with loop.between_steps:
        assert await held(loop) == sorted(jobs)
        assert {job.name for job in loop.registry} == jobs.keys()
        assert await served(loop) == {ref.served_name for ref in loop.refs.values()}
        assert loop.refs.keys() == jobs.keys()
        latest = loop.store.latest
        assert (latest.adapters.keys() if latest else set()) == jobs.keys()
        for name, job in jobs.items():
            assert latest is not None
            record = latest.adapters[name].record
            assert (record.version, record.state["steps"]) == (job.version, job.steps)
            assert loop.refs[name].version == job.version


def tensors() -> tuple[int, int]:
    """(number, bytes) of all tensors that live in this process: models, adapters, moments."""
    gc.collect()
    found = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    return len(found), sum(one.untyped_storage().nbytes() for one in found)


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(("add", "remove", "pause", "resume", "train", "train and publish")),
        st.sampled_from(NAMES),
    ),
    max_size=9,
)


async def live_through(loop: Loop, actions: list[tuple[str, str]]) -> None:
    jobs: dict[str, DrivenJob] = {}
    calls: dict[str, list[asyncio.Task[Result]]] = {name: [] for name in NAMES}
    for action, name in actions:
        if action == "add":
            if name in jobs:
                with pytest.raises(ValueError, match="has a job already"):
                    await the_loop.add(loop, driven(name))
            else:
                jobs[name] = driven(name)
                await the_loop.add(loop, jobs[name])
        elif name not in jobs:
            with pytest.raises(KeyError, match="no job trains an adapter"):
                loop.registry[name]
        elif action == "remove":
            await the_loop.remove(loop, name)
            del jobs[name]
            ended = await asyncio.gather(*calls[name], return_exceptions=True)
            assert all(isinstance(end, Result | JobFailed) for end in ended)
            calls[name] = []
        elif action in ("pause", "resume"):
            getattr(loop.registry, action)(name)
        else:
            call = jobs[name].train([example_round(name, SENTENCE)], publish="publish" in action)
            calls[name].append(asyncio.create_task(call))
        await asyncio.sleep(0)
    for name in jobs:
        loop.registry.resume(name)
        await asyncio.gather(*calls[name])  # what waited while it was paused is done now
        assert jobs[name].steps == len(calls[name])
    await assert_consistent(loop, jobs)
    for name in list(jobs):
        await the_loop.remove(loop, name)
    await assert_consistent(loop, {})


def test_jobs_come_and_go_on_a_running_loop_and_leave_nothing(running: Running) -> None:
    @settings(max_examples=100, deadline=None)
    @given(actions=ACTIONS)
    def sequences(actions: list[tuple[str, str]]) -> None:
        running.run(live_through, running.loop, actions)
        assert not running.loop.registry.paused and not running.loop.registry.failed

    before = tensors()
    sequences()
    assert tensors() == before


def test_two_drivers_adapters_learn_from_calls_in_any_order(tmp_path: Path, model: Path) -> None:
    async def body() -> None:
        async with live_loop(model, tmp_path / "run") as loop:
            alice, bob = driven("alice", seed=1), driven("bob", seed=1)
            await the_loop.add(loop, alice)
            # two calls add up to one step
            losses = []
            for _ in range(6):
                await alice.train([example_round("alice", SENTENCE, lr=None)])
                result = await alice.train([example_round("alice", SENTENCE)])
                losses.append(result.rounds[0].metrics["loss"])
            assert alice.steps == 6 and losses[-1] < losses[0] - 2
            await the_loop.add(loop, bob)
            rested = loop.store.load("alice").state.digest()
            await bob.train([example_round("bob", [5, 30, 31])], publish=True)
            assert (bob.version, alice.version) == (1, 0)
            assert loop.store.load("alice").state.digest() == rested
            with pytest.raises(ValueError, match="it is of \\('bob',\\), not of 'alice'"):
                await alice.train([example_round("bob", SENTENCE)])

        # the run is opened again: what its drivers add goes on where it stood
        async with live_loop(model, tmp_path / "run") as loop:
            again = driven("alice")
            await the_loop.add(loop, again)
            assert again.steps == 6 and loop.store.load("alice").state.digest() == rested
            result = await again.train([example_round("alice", SENTENCE)])
            assert result.rounds[0].step is not None and result.rounds[0].step.step == 7
            assert loop.store.latest is not None and set(loop.store.latest.adapters) == {
                "alice",
                "bob",  # rests, and nothing of it is lost
            }

    asyncio.run(body())


class Failing(DrivenJob):
    """Has no work but an error."""

    async def work(self):  # type: ignore[no-untyped-def]  # it never returns
        raise JobFailed("the rewards are gone")


def test_a_job_that_fails_stops_alone_and_the_run_ends_with_its_reason(
    tmp_path: Path, model: Path
) -> None:
    async def body() -> None:
        with pytest.raises(JobFailed, match="the rewards are gone"):
            async with live_loop(model, tmp_path / "run") as loop:
                good = driven("good")
                await the_loop.add(loop, good)
                await the_loop.add(loop, Failing("bad", good.spec))
                await good.train([example_round("good", SENTENCE)], publish=True)
                await good.train([example_round("good", SENTENCE)], publish=True)
                assert good.version == 2 and list(loop.registry.failed) == ["bad"]

    asyncio.run(body())
    assert check_run(tmp_path / "run") == []


def test_a_job_whose_loss_raises_stops_alone(tmp_path: Path, model: Path) -> None:
    refuses = LossSpec(path="tests.contract.losses:refuses", params={})

    async def body() -> None:
        with pytest.raises(ValueError, match="adapter 'bad': its loss raised ValueError: loss: "):
            async with live_loop(model, tmp_path / "run") as loop:
                good, bad = driven("good"), driven("bad")
                await the_loop.add(loop, good)
                await the_loop.add(loop, bad)
                found = await asyncio.gather(
                    good.train([example_round("good", SENTENCE)], publish=True),
                    bad.train([replace(example_round("bad", SENTENCE), loss=refuses)]),
                    return_exceptions=True,
                )
                assert isinstance(found[1], JobFailed)
                await good.train([example_round("good", SENTENCE)], publish=True)
                assert good.version == 2 and list(loop.registry.failed) == ["bad"]

    asyncio.run(body())
    assert check_run(tmp_path / "run") == []
