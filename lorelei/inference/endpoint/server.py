"""The HTTP server of the endpoint, on the event loop of the run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import socket
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lorelei.data.chat import ChatTemplate
from lorelei.env.contract import Sampler
from lorelei.inference.endpoint.protocol import Answer, Refused, read_request
from lorelei.inference.endpoint.session import Session

MAX_BODY = 4 * 2**20  # bytes; a context of a million tokens


class HttpEndpoint:
    """Implements env's Endpoint. Loopback only; a bearer token names the episode."""

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.base_url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/v1"
        app = Starlette(
            routes=[
                Route("/v1/chat/completions", self._completions, methods=["POST"]),
                Route("/v1/models", self._models),
            ],
            exception_handlers={Refused: _refusal},
        )
        config = uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1
        )
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None
        self._direct = contextlib.ExitStack()

    async def start(self) -> None:
        """Serve until `close`. Until then no client in this process reaches us by a proxy."""
        self._direct.enter_context(_without_proxy("127.0.0.1", "localhost"))
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started:
            if self._task.done():
                await self._task
            await asyncio.sleep(0.005)

    async def close(self) -> None:
        """Stop; what is still sampled is cancelled. Idempotent."""
        for session in list(self._sessions.values()):
            await session.close()
        self._server.should_exit = True
        if self._task is not None:
            await self._task
        self._socket.close()
        self._direct.close()

    @asynccontextmanager
    async def open(
        self, sample: Sampler, model: str, max_turns: int, chat: ChatTemplate
    ) -> AsyncIterator[Session]:
        """See Endpoint."""
        session = Session(
            base_url=self.base_url,
            api_key=secrets.token_urlsafe(24),
            chat=chat,
            sample=sample,
            model=model,
            max_turns=max_turns,
        )
        self._sessions[session.api_key] = session
        try:
            yield session
        finally:
            del self._sessions[session.api_key]
            await session.close()

    async def _completions(self, request: Request) -> Response:
        session = self._session(request)
        asked = read_request(await _body(request))
        answer = await _unless_gone(request, session.start(session.complete(asked)))
        if not asked.stream:
            return JSONResponse(answer.whole())
        chunks = answer.chunks(bool(asked.stream_options.get("include_usage")))
        events = [*(json.dumps(chunk) for chunk in chunks), "[DONE]"]
        text = "".join(f"data: {event}\n\n" for event in events)
        return Response(text, media_type="text/event-stream")

    async def _models(self, request: Request) -> Response:
        model = self._session(request).model
        listed = [{"id": model, "object": "model", "created": 0, "owned_by": "lorelei"}]
        return JSONResponse({"object": "list", "data": listed})

    def _session(self, request: Request) -> Session:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        session = self._sessions.get(token.strip()) if scheme.lower() == "bearer" else None
        if session is None:
            raise Refused(
                "the API key is that of no running episode; use the one the agent was given",
                status=401,
                code="invalid_api_key",
            )
        return session


@contextlib.contextmanager
def _without_proxy(*hosts: str) -> Generator[None, None, None]:
    """Keeps clients that an agent makes from sending loopback to the http_proxy of a cluster."""
    names = ("no_proxy", "NO_PROXY")
    before = {name: os.environ.get(name) for name in names}
    listed = [*filter(None, (before["no_proxy"] or before["NO_PROXY"] or "").split(",")), *hosts]
    os.environ.update(dict.fromkeys(names, ",".join(dict.fromkeys(listed))))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Signals are the run's."""
        yield


async def _body(request: Request) -> bytes:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise Refused(f"the body has more than {MAX_BODY} bytes", status=413)
    return body


async def _unless_gone(request: Request, work: asyncio.Task[Answer]) -> Answer:
    """The answer; nothing is sampled on for a client that went away. Raises Refused."""
    gone = asyncio.ensure_future(request.receive())  # after the body comes only the disconnect
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            work.cancel()
        return await work
    except asyncio.CancelledError:
        if not work.cancelled():
            raise
        raise Refused("the episode is over", status=503) from None
    finally:
        gone.cancel()


def _refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return JSONResponse(error.body(), status_code=error.status)
