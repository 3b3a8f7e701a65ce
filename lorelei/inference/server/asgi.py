"""One HTTP request to the routes under /lorelei, and its answer. Runs inside servers.

An answer that takes long starts with blanks, so that read_timeout means a stuck connection.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable
from contextlib import suppress
from typing import Any

BLANKS = 3.0  # seconds between two of them

Message = dict[str, Any]


class Refused(Exception):
    """An answer with an error status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Exchange:
    """One HTTP request and its answer."""

    def __init__(self, receive: Any, send: Any) -> None:
        self._receive, self._send = receive, send
        self._started = False

    async def body(self) -> bytes:
        parts: list[bytes] = []
        while True:
            message = await self._receive()
            parts.append(message.get("body", b""))
            if not message.get("more_body"):
                return b"".join(parts)

    async def answer(self, work: Awaitable[Any]) -> None:
        """Send the result of `work`; cancel it when the caller hangs up."""
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(self._gone())
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

    async def finish(self, status: int, answer: Any) -> None:
        """The last part. A late failure has its status in the body only."""
        if self._started and status >= 400:
            answer = {**answer, "status": status}
        await self._begin(status)
        await self._write(json.dumps(answer, allow_nan=True).encode(), more=False)

    async def _gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _begin(self, status: int) -> None:
        if not self._started:
            self._started = True
            headers = [(b"content-type", b"application/json")]
            await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _write(self, data: bytes, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
