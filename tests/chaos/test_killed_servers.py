"""Two servers of one engine, killed at the worst moments: they start again with every live version,
and each request has its one answer, by the version it asked for."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from lorelei.inference.limits import Limits
from lorelei.inference.server.client import Client
from lorelei.inference.server.engine import ServerEngine
from lorelei.inference.server.replicas import Replica
from lorelei.inference.sglang.backend import SglangBackend
from lorelei.lora.state import AdapterState
from lorelei.publish import xccl
from lorelei.publish.xccl import Xccl
from lorelei.types import AdapterRef, Completion, GenerateRequest
from tests.chaos.attached import right
from tests.contract.servers import VOCAB, sglang_options
from tests.contract.test_rollout_contract import PROMPT, ask, make_ref, make_state
from tests.contract.vllm_server import CONTEXT
from tests.environments import needs
from tests.processes import wait_gone

pytestmark = [needs("sglang"), pytest.mark.timeout(600)]
T = TypeVar("T")
LONG = 60  # tokens


@dataclass(slots=True, kw_only=True)
class Pair:
    """The engine, in an event loop that lives as long as it does."""

    runner: asyncio.Runner
    engine: ServerEngine
    answered: list[tuple[bytes, str]]  # (prompt, URL of the server that answered it)
    way: Xccl
    folder: Path  # of the model
    warnings: list[str]
    states: dict[AdapterRef | None, AdapterState | None]  # the base, and all live versions

    def run(self, body: Coroutine[Any, Any, T]) -> T:
        """Nothing may hang; a server takes up to a minute to start on a busy machine."""
        return self.runner.run(asyncio.wait_for(body, 240))

    def version(self, number: int) -> tuple[AdapterRef, AdapterState]:
        state = make_state(self.folder, number)
        return make_ref(state, version=number), state

    def requests(self, *refs: AdapterRef | None) -> list[GenerateRequest]:
        """Of several prompts, two samples each, in one order for all tests."""
        return [
            ask(PROMPT + prompt, ref, f"{prompt}/{sample}", max_new_tokens=LONG, seed=prompt)
            for ref in refs
            for prompt in range(4)
            for sample in range(2)
        ]

    def ask(self, requests: list[GenerateRequest]) -> list[asyncio.Task[Completion]]:
        return [asyncio.create_task(self.engine.generate(request)) for request in requests]

    def right(self, requests: list[GenerateRequest], answers: list[Completion]) -> bool:
        return right(self.folder, self.states, requests, answers)

    async def holds_all(self, replica: Replica) -> bool:
        """Whether a server, asked directly, has every live version."""
        if not replica.usable:
            return False
        status = await replica.client.status()
        return set(status.adapters) == {ref.served_name for ref in self.states if ref is not None}


@pytest.fixture(scope="module")
def pair(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder, warnings = folders["llama"], list[str]()
    answered: list[tuple[bytes, str]] = []
    generate = Client.generate

    async def noting(self: Client, request: GenerateRequest, limit: int, seed: int) -> Completion:
        sampled = await generate(self, request, limit, seed)
        answered.append((request.tokens.tobytes(), self.url))
        return sampled

    limits = Limits(vocab=VOCAB, context=CONTEXT, decodes_text=False)
    logs = tmp_path_factory.mktemp("logs")
    with asyncio.Runner() as runner, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Client, "generate", noting)
        engine = ServerEngine(
            SglangBackend(sglang_options(folder)), limits, logs, replicas=2, max_running=8
        )
        try:
            runner.run(asyncio.wait_for(engine.start(), 240))
            yield Pair(
                runner=runner,
                engine=engine,
                answered=answered,
                way=Xccl(engine, torch.device("cpu"), "127.0.0.1", 20.0, warnings.append),
                folder=folder,
                warnings=warnings,
                states={None: None},
            )
        finally:
            processes = [pid for r in engine.replicas if r.process for pid in r.process.pids]
            runner.run(engine.close())
    assert wait_gone(processes)
    assert sorted(path.name for path in logs.iterdir()) == ["sglang-0.log", "sglang-1.log"]


def test_two_replicas_share_the_work_and_both_have_every_version(pair: Pair) -> None:
    async def body() -> None:
        for number in (1, 2):
            ref, state = pair.version(number)
            assert await pair.way.send(ref, state) == ref.digest
            pair.states[ref] = state
        assert (pair.way.broadcasts, pair.way.fallbacks) == (2, 0)
        assert all([await pair.holds_all(replica) for replica in pair.engine.replicas])
        requests = pair.requests(None)
        assert pair.right(requests, await asyncio.gather(*pair.ask(requests)))
        places = set(pair.answered)
        assert len(places) == 4, "both samples of a prompt were asked where its prefix is cached"
        assert len({url for _, url in places}) == 2
        requests = pair.requests(*pair.states)
        assert pair.right(requests, await asyncio.gather(*pair.ask(requests)))
        shares = [replica.finished for replica in pair.engine.replicas]
        assert min(shares) > len(requests) // 4, shares

    pair.run(body())


@pytest.mark.matrix
def test_a_server_killed_while_it_generates_and_loads_is_replaced(pair: Pair) -> None:
    victim, other = pair.engine.replicas

    async def body() -> None:
        requests = pair.requests(*pair.states)
        undisturbed = await asyncio.gather(*pair.ask(requests))
        asked = pair.ask(requests)
        await until(lambda: busy(victim))
        assert victim.process is not None
        pids = victim.process.pids
        for pid in pids:  # from now on it answers nothing: the load is begun and not done
            os.kill(pid, signal.SIGSTOP)
        ref, state = pair.version(3)
        load = asyncio.create_task(pair.engine.load(ref, state))
        await until(lambda: holds(other, ref))
        await asyncio.sleep(0.2)
        assert not load.done() and ref.served_name not in victim.loaded
        os.kill(pids[0], signal.SIGKILL)
        answers = await asyncio.gather(*asked)
        assert pair.right(requests, answers)
        assert [a.tokens.tolist() for a in answers] == [a.tokens.tolist() for a in undisturbed]
        assert await load == ref.digest
        pair.states[ref] = state
        assert (victim.incarnation, other.incarnation) == (2, 1)
        assert all([await pair.holds_all(replica) for replica in pair.engine.replicas])
        requests = pair.requests(ref)
        assert pair.right(requests, await asyncio.gather(*pair.ask(requests)))
        assert wait_gone(pids), "nothing of the first server is left"

    pair.run(body())


def test_servers_killed_in_a_broadcast_and_behind_one_come_back_and_form_a_group(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first dies in the middle of the broadcast, the second just after it said 'loaded'."""
    first, second = pair.engine.replicas
    before = [replica.incarnation for replica in pair.engine.replicas]
    published_before = pair.way.broadcasts + pair.way.fallbacks
    send = xccl.broadcast.send

    def kill_and_send(*arguments: Any) -> None:
        monkeypatch.setattr(xccl.broadcast, "send", send)
        os.kill(scheduler(first), signal.SIGKILL)
        send(*arguments)

    async def body() -> None:
        ref, state = pair.version(4)
        monkeypatch.setattr(xccl.broadcast, "send", kill_and_send)
        published = asyncio.create_task(pair.way.send(ref, state))
        await until(lambda: holds(second, ref))
        assert second.process is not None
        os.kill(second.process.pids[0], signal.SIGKILL)
        assert not published.done(), "the first has to come back before a version is published"
        requests = pair.requests(*pair.states)
        asked = pair.ask(requests)
        assert pair.right(requests, await asyncio.gather(*asked))
        assert await published == ref.digest
        pair.states[ref] = state
        requests = pair.requests(ref)
        assert pair.right(requests, await asyncio.gather(*pair.ask(requests)))
        for replica in pair.engine.replicas:
            await until(lambda replica=replica: pair.holds_all(replica))
        assert [first.incarnation, second.incarnation] == [count + 1 for count in before]
        broadcasts, fallbacks = pair.way.broadcasts, pair.way.fallbacks
        assert broadcasts + fallbacks == published_before + 1
        assert len(pair.warnings) == fallbacks
        ref, state = pair.version(5)
        assert await pair.way.send(ref, state) == ref.digest
        pair.states[ref] = state
        assert (pair.way.broadcasts, pair.way.fallbacks) == (broadcasts + 1, fallbacks)
        assert all([await pair.holds_all(replica) for replica in pair.engine.replicas])

    pair.run(body())


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """The deadline is that of the test."""
    while not await condition():
        await asyncio.sleep(0.02)


async def busy(replica: Replica) -> bool:
    return replica.in_flight > 2


async def holds(replica: Replica, ref: AdapterRef) -> bool:
    return ref.served_name in replica.loaded


def scheduler(replica: Replica) -> int:
    """The process of a server that holds the model."""
    assert replica.process is not None
    for pid in replica.process.pids:
        if b"sglang::scheduler" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    raise AssertionError("there is no scheduler")
