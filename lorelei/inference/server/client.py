"""HTTP to one server: deadlines, and whose fault a failure is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import httpx

CONNECT = 5.0  # seconds
_BUSY = {408, 425, 429}


class ServerTrouble(RuntimeError):
    """The server or the way to it failed: the same call may work later, or elsewhere."""


class Client:
    """JSON calls to one server.

    Raises ServerTrouble for lost connections, read timeouts, 5xx and answers that are not whole
    JSON; KeyError for 404; ValueError for every other 4xx. Texts are the server's.
    """

    def __init__(self, url: str, token: str | None = None, read_timeout: float = 60.0) -> None:
        """read_timeout: seconds without a single byte after which a connection counts as stuck."""
        self.url = url.rstrip("/")
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=httpx.Timeout(read_timeout, connect=CONNECT, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            trust_env=False,  # no proxy stands between us and a server
        )

    async def get(self, path: str, read_timeout: float | None = None) -> Any:
        """The JSON answer."""
        return await self._call("GET", path, read_timeout)

    async def post(
        self, path: str, body: Mapping[str, Any] | None = None, read_timeout: float | None = None
    ) -> Any:
        """The JSON answer to a JSON body."""
        return await self._call("POST", path, read_timeout, json=dict(body or {}))

    async def post_bytes(
        self, path: str, data: bytes, query: Mapping[str, str], read_timeout: float | None = None
    ) -> Any:
        """The JSON answer to raw bytes."""
        headers = {"Content-Type": "application/octet-stream"}
        return await self._call(
            "POST", path, read_timeout, content=data, params=dict(query), headers=headers
        )

    async def get_text(self, path: str, read_timeout: float | None = None) -> str:
        """The answer as it is."""
        return (await self._send("GET", path, read_timeout)).text

    async def close(self) -> None:
        """Close the connections. Idempotent."""
        await self._http.aclose()

    async def _call(
        self, method: str, path: str, read_timeout: float | None, **content: Any
    ) -> Any:
        response = await self._send(method, path, read_timeout, **content)
        try:
            return json.loads(response.content or b"null")
        except ValueError as error:
            raise ServerTrouble(
                f"{method} {self.url}{path}: the answer is not whole JSON ({error})"
            ) from error

    async def _send(
        self, method: str, path: str, read_timeout: float | None, **content: Any
    ) -> httpx.Response:
        if read_timeout is not None:
            content["timeout"] = httpx.Timeout(read_timeout, connect=CONNECT, pool=None)
        try:
            response = await self._http.request(method, path, **content)
        except (httpx.TransportError, httpx.DecodingError) as error:
            reason = str(error) or type(error).__name__
            raise ServerTrouble(f"{method} {self.url}{path}: {reason}") from error
        status, text = response.status_code, _reason(response)
        if status < 400:
            return response
        if status >= 500 or status in _BUSY:
            raise ServerTrouble(f"{method} {self.url}{path}: {status} {text}")
        if status == 404:
            raise KeyError(text)
        raise ValueError(text)


def _reason(response: httpx.Response) -> str:
    """What an error answer says; both servers put it in one of a few places."""
    if response.status_code < 400:
        return ""
    try:
        found: Any = json.loads(response.content)
    except ValueError:
        return response.text[:500]
    for key in ("error", "message", "detail"):
        while isinstance(found, dict) and key in found:
            found = found[key]
    return str(found)[:500]
