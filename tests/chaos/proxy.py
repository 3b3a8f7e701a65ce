"""A real proxy before a real server, on loopback: it injects faults, and it lies."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

Json = dict[str, Any]
Kind = Literal["refused", "500", "500 after", "cut", "half", "stuck"]
ALWAYS = 10**9


@dataclass(slots=True, kw_only=True)
class Fault:
    """What happens to the answers of one route under /lorelei, so many times."""

    route: str
    # refused: no connection. 500: the server is not asked. 500 after: it is. cut: the connection
    # ends in the middle. half: half of the JSON in a whole answer. stuck: read_timeout. A function
    # changes the JSON.
    kind: Kind | Callable[[Json], Any]
    times: int = 1


@dataclass(slots=True, kw_only=True)
class Proxy:
    """Forwards HTTP/1.1, one request for each connection. `async with` runs it."""

    server: str  # URL
    faults: list[Fault] = field(default_factory=list[Fault])
    rewrite: Callable[[str, Json], Json] = lambda route, asked: asked  # requests with a JSON body
    seen: Counter[str] = field(default_factory=Counter[str])  # requests by route
    url: str = ""
    _listener: asyncio.Server | None = None
    _busy: set[asyncio.Task[Any]] = field(default_factory=set[asyncio.Task[Any]])

    async def __aenter__(self) -> Proxy:
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._listener is not None
        self._listener.close()
        for task in list(self._busy):
            task.cancel()
        await asyncio.gather(*self._busy, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._busy.add(task)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                await self._exchange(reader, writer)
        finally:
            self._busy.discard(task)
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        body = await reader.readexactly(int(_header(head, "content-length") or 0))
        route = urlsplit(head.split()[1]).path.removeprefix("/lorelei/")
        self.seen[route] += 1
        if _header(head, "content-type") == "application/json":
            body = json.dumps(self.rewrite(route, json.loads(body))).encode()
        fault = next((f for f in self.faults if f.route == route and f.times > 0), None)
        if fault is not None:
            fault.times -= 1
        if fault is not None and fault.kind == "refused":
            return
        if fault is not None and fault.kind == "500":
            writer.write(_answer(500, b"Internal Server Error"))
            return
        there, out = await asyncio.open_connection(*self._address)
        try:
            out.write(_with(head, len(body)) + body)
            if fault is None:
                await self._pump(there, writer, reader)
            else:
                await self._spoil(fault, await there.read(), writer)
        finally:
            out.close()

    @property
    def _address(self) -> tuple[str, int]:
        parts = urlsplit(self.server)
        assert parts.hostname is not None and parts.port is not None
        return parts.hostname, parts.port

    async def _pump(
        self,
        there: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        caller: asyncio.StreamReader,
    ) -> None:
        """Pass on what comes as it comes; stop when either side hangs up."""
        gone = asyncio.ensure_future(caller.read(1))
        try:
            while True:
                part = asyncio.ensure_future(there.read(1 << 16))
                await asyncio.wait({part, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not part.done() or not part.result():
                    part.cancel()
                    return
                writer.write(part.result())
                await writer.drain()
        finally:
            gone.cancel()

    async def _spoil(self, fault: Fault, whole: bytes, writer: asyncio.StreamWriter) -> None:
        head, _, body = whole.partition(b"\r\n\r\n")
        if b"transfer-encoding: chunked" in head.lower():
            body = _joined(body)
        match fault.kind:
            case "500 after":
                writer.write(_answer(500, b"Internal Server Error"))
            case "cut":
                answer = _answer(200, body)
                writer.write(answer[: len(answer) - len(body) // 2])
            case "half":
                writer.write(_answer(200, body[: len(body) // 2]))
            case "stuck":
                await asyncio.Event().wait()
            case change:
                assert callable(change)
                writer.write(_answer(200, json.dumps(change(json.loads(body))).encode()))
        await writer.drain()


def _header(head: str, name: str) -> str | None:
    for line in head.split("\r\n")[1:]:
        key, _, value = line.partition(":")
        if key.lower() == name:
            return value.strip()
    return None


def _with(head: str, length: int) -> bytes:
    """The head of a request for one connection, with this length of its body."""
    lines = head.rstrip("\r\n").split("\r\n")
    ours = ("content-length", "connection")
    kept = [line for line in lines if line.partition(":")[0].lower() not in ours]
    return "\r\n".join([*kept, f"content-length: {length}", "connection: close", "", ""]).encode()


def _answer(status: int, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status} -\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    return head.encode() + body


def _joined(chunks: bytes) -> bytes:
    """The body of an answer that came in chunks."""
    found = b""
    while True:
        size, _, chunks = chunks.partition(b"\r\n")
        if not (count := int(size, 16)):
            return found
        found, chunks = found + chunks[:count], chunks[count + 2 :]
