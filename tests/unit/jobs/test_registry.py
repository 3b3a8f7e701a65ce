"""The registry: which works come, together with which, and what happens to the other jobs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

import pytest

from lorelei.jobs.job import Job
from lorelei.jobs.registry import Registry
from lorelei.train.work import Work

T = TypeVar("T")


class Scripted:
    """Gives the works that it is told to, or raises; `steps` of them."""

    def __init__(self, name: str, steps: int = 99) -> None:
        self.name, self.steps, self.taken = name, steps, 0
        self.next: asyncio.Queue[Exception | None] = asyncio.Queue()

    @property
    def done(self) -> bool:
        return self.taken >= self.steps

    def offer(self, count: int = 1) -> None:
        """Have `count` works ready."""
        for _ in range(count):
            self.next.put_nowait(None)

    async def work(self) -> Work:
        if (error := await self.next.get()) is not None:
            raise error
        return Work(adapter=self.name, rounds=())


def run(body: Coroutine[Any, Any, T]) -> T:
    async def whole() -> T:
        result = await asyncio.wait_for(body, 20)
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return result

    return asyncio.run(whole())


def of(*jobs: Scripted, warnings: list[str] | None = None) -> Registry:
    found: list[str] = [] if warnings is None else warnings
    return Registry([job for job in jobs if is_job(job)], found.append)


def is_job(job: Any) -> Job:
    """All that a registry asks of a job."""
    return job


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def step(registry: Registry, ready: AsyncGenerator[list[Work], None]) -> list[str]:
    """The adapters whose works come next, as if they were trained on; [] at the end."""
    works = await anext(ready, [])
    for work in works:
        assert registry.claim(work)
        registry[work.adapter].taken += 1  # type: ignore[attr-defined]
    return [work.adapter for work in works]


def test_what_is_ready_comes_together_and_nobody_waits_for_the_others() -> None:
    async def body() -> None:
        a, b, slow = Scripted("a", 3), Scripted("b", 2), Scripted("slow", 1)
        registry = of(a, b, slow)
        ready = registry.ready()
        a.offer(3)
        assert await step(registry, ready) == ["a"]
        b.offer(2)
        await settle()  # while a is trained
        assert await step(registry, ready) == ["b"], "a is asked again only now"
        await settle()
        assert await step(registry, ready) == ["a"]
        slow.offer()
        await settle()
        assert await step(registry, ready) == ["b", "slow"]
        assert await step(registry, ready) == ["a"]
        assert await step(registry, ready) == []

    run(body())


def test_a_job_that_is_added_is_asked_at_once() -> None:
    async def body() -> None:
        a, b = Scripted("a"), Scripted("b", 1)
        registry = of(a)
        ready = registry.ready()
        waiting = asyncio.create_task(step(registry, ready))
        await settle()
        b.offer()
        registry.add(is_job(b))
        assert await waiting == ["b"]
        with pytest.raises(ValueError, match="adapter 'b' has a job already; remove it first"):
            registry.add(is_job(Scripted("b")))
        await ready.aclose()

    run(body())


def test_the_work_of_a_paused_job_waits_until_it_is_resumed() -> None:
    async def body() -> None:
        a, b = Scripted("a", 1), Scripted("b", 2)
        registry = of(a, b)
        ready = registry.ready()
        b.offer()
        assert await step(registry, ready) == ["b"]
        registry.pause("a")
        assert registry.paused == {"a"}
        a.offer()  # it was asked already
        b.offer()
        await settle()
        assert await step(registry, ready) == ["b"]
        waiting = asyncio.create_task(step(registry, ready))
        await settle()
        assert not waiting.done(), "a paused job is waited for"
        registry.resume("a")
        assert await waiting == ["a"]
        assert await step(registry, ready) == [] and registry.finished

    run(body())


def test_a_removed_job_gives_nothing_any_more() -> None:
    async def body() -> None:
        a, b = Scripted("a"), Scripted("b", 1)
        registry = of(a, b)
        ready = registry.ready()
        a.offer()
        assert await step(registry, ready) == ["a"]
        a.offer()
        waiting = asyncio.create_task(step(registry, ready))
        assert registry.remove("a") is a
        b.offer()
        assert await waiting == ["b"] and "a" not in registry
        with pytest.raises(KeyError, match="no job trains an adapter 'a'; there are: b"):
            registry.remove("a")
        assert await step(registry, ready) == []

    run(body())


def test_a_work_is_claimed_once_and_not_for_a_later_job_of_the_same_name() -> None:
    async def body() -> None:
        old, new = Scripted("a"), Scripted("a", 1)
        registry = of(old)
        ready = registry.ready()
        old.offer()
        (given,) = await anext(ready)
        registry.remove("a")
        registry.add(is_job(new))
        assert not registry.claim(given)
        new.offer()
        (given,) = await anext(ready)
        assert registry.claim(given) and not registry.claim(given)
        await ready.aclose()

    run(body())


def test_a_job_that_fails_is_put_aside_with_a_warning_and_the_others_go_on() -> None:
    async def body() -> None:
        bad, good, warnings = Scripted("bad"), Scripted("good", 2), list[str]()
        registry = of(bad, good, warnings=warnings)
        ready = registry.ready()
        error = ValueError("group after group fails")
        bad.next.put_nowait(error)
        good.offer()
        assert await step(registry, ready) == ["good"]
        good.offer()
        assert await step(registry, ready) == ["good"]
        assert await step(registry, ready) == []
        assert registry.failed == {"bad": error} and not registry.finished
        assert warnings == ["adapter bad stops, the others go on: group after group fails"]

    run(body())


def test_the_last_job_that_fails_ends_it_without_a_warning() -> None:
    async def body() -> None:
        bad, warnings = Scripted("bad"), list[str]()
        registry = of(bad, warnings=warnings)
        bad.next.put_nowait(ValueError("no"))
        assert [works async for works in registry.ready()] == []
        assert list(registry.failed) == ["bad"] and warnings == []

    run(body())


def test_what_is_no_ones_input_ends_all() -> None:
    async def body() -> None:
        bad, good = Scripted("bad"), Scripted("good")
        bad.next.put_nowait(RuntimeError("the engine died"))
        with pytest.raises(RuntimeError, match="the engine died"):
            await anext(of(bad, good).ready())

    run(body())


def test_stop_ends_it_at_once_and_leaves_no_task() -> None:
    async def body() -> None:
        a, b = Scripted("a"), Scripted("b")
        registry = of(a, b)
        ready = registry.ready()
        waiting = asyncio.create_task(step(registry, ready))
        await settle()
        registry.stop()
        assert await waiting == []
        a.offer()
        assert await step(registry, registry.ready()) == []

    run(body())
