"""A real server behind a proxy that lies: the canary stops the run before the step is committed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lorelei.inference.server.client import Client
from lorelei.loop import Loop
from lorelei.publish.page import CanaryFailed
from lorelei.store.check import check_run
from lorelei.types import AdapterRef
from tests.chaos.attached import attached
from tests.chaos.proxy import Json, Proxy
from tests.contract.servers import TOKEN, Servers
from tests.contract.test_rollout_contract import make_state
from tests.environments import needs
from tests.loops import open_loop, versions, whole
from tests.tiny_runs import make_workplace, records, write_run

pytestmark = needs("sglang")


@dataclass(slots=True, kw_only=True)
class Liar:
    """Rewrites which adapter a request names, from version `since` on."""

    since: int
    names: dict[int, str] = field(default_factory=dict[int, str])  # seen so far, by version

    def __call__(self, route: str, asked: Json) -> Json:
        if route not in ("generate", "score") or asked["adapter"] is None:
            return asked
        version = int(asked["adapter"].split("-v")[1].split("-")[0])
        self.names[version] = asked["adapter"]
        if version < self.since:
            return asked
        return {**asked, "adapter": self.instead(version)}

    def instead(self, version: int) -> str | None:
        raise NotImplementedError


@dataclass(slots=True, kw_only=True)
class Ignores(Liar):
    def instead(self, version: int) -> str | None:
        return None


@dataclass(slots=True, kw_only=True)
class ServesTheVersionBefore(Liar):
    def instead(self, version: int) -> str | None:
        return self.names[version - 1]


@dataclass(slots=True, kw_only=True)
class ServesAnotherRuns(Liar):
    others: str

    def instead(self, version: int) -> str | None:
        return self.others


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    return make_workplace(tmp_path_factory.mktemp("place"), tiny_tokenizer)


@pytest.fixture
def server(servers: Servers, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a server on the workplace's model."""
    monkeypatch.setenv("LORELEI_SERVER_TOKEN", TOKEN)
    return servers.url("sglang", folders["llama"])


def loop_of(folder: Path, place: Path, url: str) -> AbstractAsyncContextManager[Loop]:
    """The loop of a run over an attached server, built as `lorelei train` or `resume` does."""
    rollout = {"kind": "sglang", "urls": [url], "n_samples": 4, "max_new_tokens": 8}
    return open_loop(write_run(place, "run", eval={"every": 0}, rollout=rollout), folder)


@asynccontextmanager
async def anothers(server: str, model: Path) -> AsyncIterator[str]:
    """The name of an adapter that another run has on the same server."""
    state = make_state(model, seed=11, rank=4)
    ref = AdapterRef(name="default", version=2, run_id="another", digest=state.digest())
    async with attached(server, model) as (engine, _):
        await engine.load(ref, state)
        yield ref.served_name


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        (Ignores, "answers as the base model"),
        (ServesTheVersionBefore, "answers as version 1"),
        (ServesAnotherRuns, "answers as"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_server_that_begins_to_lie_stops_the_run_which_resumes_on_an_honest_one(
    tmp_path: Path, place: Path, server: str, folders: dict[str, Path], lie: Any, said: str
) -> None:
    async def body() -> None:
        async with anothers(server, folders["llama"]) as others:
            options = {"others": others} if lie is ServesAnotherRuns else {}
            async with (
                Proxy(server=server, rewrite=lie(since=2, **options)) as proxy,
                loop_of(tmp_path / "run", place, proxy.url) as loop,
            ):
                with pytest.raises(CanaryFailed, match=f"default@v2: .*{said}"):
                    await whole(loop)
                assert loop.store.latest is not None and loop.store.latest.step == 1
            assert others in await adapters(server)
        assert await adapters(server) == (), "the run has left the server as it was"
        async with loop_of(tmp_path / "run", place, server) as loop:
            assert versions(loop) == {"default": 1}
            await whole(loop)

    asyncio.run(asyncio.wait_for(body(), 120))
    assert check_run(tmp_path / "run") == []
    assert [r["step"] for r in records(tmp_path / "run", "step")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("lie", "said"),
    [(Ignores, "the adapter is ignored"), (ServesAnotherRuns, "another adapter is served")],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_server_that_lies_from_the_start_is_caught_before_the_first_step(
    tmp_path: Path, place: Path, server: str, folders: dict[str, Path], lie: Any, said: str
) -> None:
    async def body() -> None:
        async with anothers(server, folders["llama"]) as others:
            options = {"others": others} if lie is ServesAnotherRuns else {}
            async with (
                Proxy(server=server, rewrite=lie(since=0, **options)) as proxy,
                loop_of(tmp_path / "run", place, proxy.url) as loop,
            ):
                with pytest.raises(CanaryFailed, match="adapter default: ") as caught:
                    await whole(loop)
                assert loop.store.latest is None
                assert said in "\n".join(caught.value.page)
        assert await adapters(server) == ()

    asyncio.run(asyncio.wait_for(body(), 120))


async def adapters(server: str) -> tuple[str, ...]:
    """What the server holds."""
    client = Client(server, TOKEN)
    try:
        return (await client.status()).adapters
    finally:
        await client.close()
