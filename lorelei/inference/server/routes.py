"""The routes under /lorelei, the same in every kind of server: an ASGI middleware.

Runs inside servers. A request's body is a JSON object, or bytes with a query; the answer is a JSON
object. An answer that takes long starts with blanks, so that a read timeout means a stuck
connection.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Protocol

from starlette.datastructures import State
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

PREFIX = "/lorelei/"
TOKEN = "LORELEI_SERVER_TOKEN"  # environment variable; required unless bound to loopback
LOOPBACK = ("127.0.0.1", "localhost", "::1")
BLANKS = 3.0  # seconds between two of them

Json = dict[str, Any]
Handler = Callable[[Json], Awaitable[Json]]


class Refused(Exception):
    """An answer with an error status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Server(Protocol):
    """What a kind of server does for the routes. Names of adapters are served names.

    Raises Refused; KeyError and other errors become status 500, ValueError 400.
    """

    host: str  # that it is bound to

    # sample one answer; cancelled when the caller hangs up
    async def generate(self, asked: Json) -> Json: ...
    # log-probabilities of the tokens after the first of each sequence
    async def score(self, asked: Json) -> Json: ...
    # install a payload (name, kind, body), 404 for a broadcast that has not come; idempotent;
    # answers the digest of what the workers hold
    async def load(self, asked: Json) -> Json: ...
    # begin to form a broadcast group (fields of `broadcast.Group`); does not wait for it
    async def join(self, asked: Json) -> Json: ...
    # begin to receive `size` bytes of an adapter in a group; does not wait for them
    async def receive(self, asked: Json) -> Json: ...
    # give up a broadcast group and whatever is still awaited in it; idempotent
    async def leave(self, asked: Json) -> Json: ...
    # forget an adapter, its tensors included; idempotent
    async def unload(self, asked: Json) -> Json: ...
    # stop after the running step, keeping all requests
    async def pause(self, asked: Json) -> Json: ...
    async def resume(self, asked: Json) -> Json: ...
    # end all requests, or those of one adapter; they answer what they have with 'abort'
    async def abort(self, asked: Json) -> Json: ...
    # give back the accelerator's memory; nothing is running; on a CPU: only pause
    async def sleep(self, asked: Json) -> Json: ...
    async def wake(self, asked: Json) -> Json: ...
    # counters; cheap, never behind generation
    async def status(self, asked: Json) -> Json: ...
    # what the server can do
    async def facts(self, asked: Json) -> Json: ...


# behind /lorelei/: a method of `Server` each
ROUTES = (
    *("generate", "score", "load", "join", "receive", "leave", "unload"),
    *("pause", "resume", "abort", "sleep", "wake", "status", "facts"),
)


class Middleware:
    """Answers what is under /lorelei; every other path is the server's own."""

    def __init__(self, app: ASGIApp, make: Callable[[State], Server]) -> None:
        """make: from the application's state, once it serves; raises Refused before."""
        self._app, self._make = app, make
        self._server: Server | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(PREFIX):
            await self._app(scope, receive, send)
            return
        request, answer = Request(scope, receive), _Answer(send)
        try:
            self._server = self._server or self._make(scope["app"].state)
            _check_token(request, self._server.host)
            route = scope["path"].removeprefix(PREFIX)
            if route not in ROUTES:
                raise Refused(404, f"{scope['path']}: there is no such route")
            handler: Handler = getattr(self._server, route)
            await answer.wait(handler(_asked(request, await request.body())), receive)
        except Refused as refused:
            await answer.finish(refused.status, {"error": str(refused)})
        except ValueError as error:
            await answer.finish(400, {"error": str(error)})
        except Exception as error:  # the border: whatever happens is the answer
            await answer.finish(500, {"error": f"{type(error).__name__}: {error}"})


def _asked(request: Request, body: bytes) -> Json:
    if request.headers.get("content-type") == "application/octet-stream":
        return {**request.query_params, "body": body}
    return json.loads(body or b"{}")


def _check_token(request: Request, host: str) -> None:
    expected = os.environ.get(TOKEN)
    if not expected:
        if host not in LOOPBACK:
            raise Refused(403, f"bound to {host} without {TOKEN}; set it, here and at the trainer")
        return
    given = request.headers.get("authorization", "")
    if not hmac.compare_digest(given.encode(), f"Bearer {expected}".encode()):
        raise Refused(403, f"the token differs from the server's {TOKEN}")


class _Answer:
    """One answer, which may begin before it is known."""

    def __init__(self, send: Send) -> None:
        self._send, self._started = send, False

    async def wait(self, work: Awaitable[Json], receive: Receive) -> None:
        """Send the result of `work`; cancel it when the caller hangs up."""
        task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_hung_up(receive))
        try:
            while not task.done():
                await asyncio.wait(
                    {task, gone}, timeout=BLANKS, return_when=asyncio.FIRST_COMPLETED
                )
                if gone.done() and not task.done():
                    return
                if not task.done():
                    await self._begin(200)
                    await self._write(b" ", more=True)
            await self.finish(200, task.result())
        finally:
            for part in (task, gone):
                part.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await part

    async def finish(self, status: int, answer: Json) -> None:
        """The last part. A late failure has its status in the body only."""
        if self._started and status >= 400:
            answer = {**answer, "status": status}
        await self._begin(status)
        await self._write(json.dumps(answer, allow_nan=True).encode(), more=False)

    async def _begin(self, status: int) -> None:
        if not self._started:
            self._started = True
            headers = [(b"content-type", b"application/json")]
            await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _write(self, data: bytes, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": more})


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
