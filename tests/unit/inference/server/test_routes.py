"""The routes inside servers and the client that calls them, over an ASGI connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from lorelei.inference.server import routes
from lorelei.inference.server.client import Client, ServerTrouble
from lorelei.inference.server.payload import BROADCAST, BYTES, FOLDER, Payload
from lorelei.inference.server.process import free_port
from lorelei.inference.server.routes import Json, Middleware, Refused
from lorelei.types import AdapterRef

REF = AdapterRef(name="math", version=3, run_id="run1", digest="0" * 64)
T = TypeVar("T")


class Echo:
    """Answers every route with its name and what was asked."""

    host = "127.0.0.1"
    secret = "not a route"

    def __init__(self) -> None:
        self.cancelled = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        if name not in routes.ROUTES:
            raise AttributeError(name)

        async def answer(asked: Json) -> Json:
            return {"route": name, "asked": sorted(asked)}

        return answer

    async def load(self, asked: Json) -> Json:
        if asked["kind"] == "broadcast":
            raise Refused(404, "nothing has come")
        return {"digest": f"{asked['name']} {asked['kind']} {asked['body'].decode()}"}

    async def score(self, asked: Json) -> Json:
        raise ValueError("too long")

    async def sleep(self, asked: Json) -> Json:
        """Fails after the answer has begun."""
        await asyncio.sleep(0.15)
        raise Refused(422, "too late")

    async def generate(self, asked: Json) -> Json:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return {}


@asynccontextmanager
async def serving(server: Echo) -> AsyncIterator[str]:
    """The URL of an application with our middleware."""
    app = Starlette(routes=[Route("/health", lambda request: PlainTextResponse("its own"))])
    app.add_middleware(Middleware, make=lambda state: server)  # type: ignore[arg-type]
    port = free_port()
    config = uvicorn.Config(app, port=port, log_config=None, timeout_graceful_shutdown=1)
    runner = uvicorn.Server(config)
    task = asyncio.create_task(runner.serve())
    while not runner.started:
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        runner.should_exit = True
        await task


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(routes.TOKEN, "secret-token")
    monkeypatch.setattr(routes, "BLANKS", 0.05)


def run(body: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(body, 30))


def test_only_the_routes_of_the_table_are_routes() -> None:
    async def body() -> None:
        async with serving(Echo()) as url, httpx.AsyncClient() as http:
            headers = {"Authorization": "Bearer secret-token"}
            for path in ("app", "_app", "host", "secret", "__init__", "cancelled", "", "a/b"):
                answer = await http.post(f"{url}/lorelei/{path}", headers=headers)
                assert answer.status_code == 404, path
            assert (await http.get(f"{url}/health")).text == "its own"

    run(body())


def test_nobody_is_served_without_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        server = Echo()
        async with serving(server) as url:
            for given in (None, "another"):
                with pytest.raises(ValueError, match=r"token differs .*LORELEI_SERVER_TOKEN"):
                    await Client(url, given).call("facts")
            assert (await Client(url, "secret-token").call("facts"))["route"] == "facts"
            monkeypatch.delenv(routes.TOKEN)
            assert (await Client(url).call("facts"))["route"] == "facts"
            server.host = "0.0.0.0"
            with pytest.raises(ValueError, match=r"bound to 0\.0\.0\.0 without"):
                await Client(url).call("facts")

    run(body())


def test_each_kind_of_payload_goes_through_the_one_route() -> None:
    async def body() -> None:
        async with serving(Echo()) as url:
            client, name = Client(url, "secret-token"), REF.served_name
            assert await client.load(REF, Payload(BYTES, b"tensors")) == f"{name} bytes tensors"
            assert (
                await client.load(REF, Payload(FOLDER, "/a b/ä".encode()))
                == f"{name} folder /a b/ä"
            )
            # what a broadcast did not bring comes as bytes
            assert await client.load(REF, Payload(BROADCAST, b"same")) == f"{name} bytes same"
            await client.close()

    run(body())


def test_failures_are_told_apart_before_and_behind_the_start_of_the_answer() -> None:
    async def body() -> None:
        async with serving(Echo()) as url:
            client = Client(url, "secret-token")
            with pytest.raises(ValueError, match="too long"):
                await client.call("score")
            with pytest.raises(ValueError, match="too late"):
                await client.call("sleep", read_timeout=0.1)  # kept alive by the blanks
            with pytest.raises(ServerTrouble, match="500 KeyError: 'kind'"):
                await client.call("load")
            await client.close()

    run(body())


def test_a_caller_that_hangs_up_cancels_the_work() -> None:
    async def body() -> None:
        server = Echo()
        async with serving(server) as url:
            client = Client(url, "secret-token")
            call = asyncio.create_task(client.call("generate"))
            await asyncio.sleep(0.2)
            call.cancel()
            await server.cancelled.wait()
            await client.close()

    run(body())
