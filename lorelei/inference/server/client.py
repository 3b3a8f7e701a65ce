"""HTTP client of one server's routes under /lorelei: deadlines, and whose fault a failure is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

from lorelei.inference.contract import completion
from lorelei.inference.server.payload import BROADCAST, BYTES, Payload
from lorelei.types import (
    AdapterRef,
    Completion,
    FinishReason,
    Floats,
    GenerateRequest,
    Ints,
    SamplingParams,
)

CONNECT = 5.0  # seconds
READ_TIMEOUT = 30.0  # seconds; while a server works on an answer it sends a blank every three
QUICK = 10.0  # seconds for an answer that waits for nothing
_BUSY = {408, 425, 429}
_REASONS: Mapping[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}


class ServerTrouble(RuntimeError):
    """The server or its connection failed: the same call may work later, or elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """A server's counters."""

    tokens_generated: int  # since its start
    adapters: tuple[str, ...]  # served names


class Client:
    """The routes of one server (see `routes.Server` for what each does).

    Raises ServerTrouble for lost connections, read timeouts, 5xx and damaged answers; KeyError for
    404; ValueError for every other 4xx. Texts are the server's.
    """

    def __init__(
        self, url: str, token: str | None = None, read_timeout: float = READ_TIMEOUT
    ) -> None:
        """read_timeout: seconds without a single byte after which a connection counts as stuck."""
        self.url = url.rstrip("/")
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=httpx.Timeout(read_timeout, connect=CONNECT, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            trust_env=False,  # no proxy stands between us and a server
        )

    async def generate(self, request: GenerateRequest, limit: int, seed: int) -> Completion:
        """Sample at most `limit` tokens. Cancelling the call aborts the request."""
        name = served_name(request.adapter)
        asked = _sampling(request.sampling, limit, seed)
        answer = await self.call(
            "generate", {**asked, "tokens": request.tokens.tolist(), "adapter": name}
        )
        with self.reading():
            served, end = answer["adapter"], _REASONS[answer["finish_reason"]]
            sampled = completion(request.adapter, answer["tokens"], answer["logprobs"], end)
        if served != name:
            raise ServerTrouble(f"{self.url}: a wrong answer: {served} answered for {name}")
        return sampled

    async def warm_up(self) -> None:
        """One real request: a server may report itself healthy and crash on the first one."""
        asked = _sampling(SamplingParams(), limit=2, seed=0)
        await self.call("generate", {**asked, "tokens": [1, 2, 3], "adapter": None})

    async def score(
        self, sequences: Sequence[Ints], adapter: AdapterRef | None, temperature: float
    ) -> list[Floats]:
        """As InferenceEngine.score."""
        asked = {
            "sequences": [sequence.tolist() for sequence in sequences],
            "adapter": served_name(adapter),
            "temperature": temperature,
        }
        answer = await self.call("score", asked)
        with self.reading():
            scores = [np.array(one, dtype=np.float32) for one in answer["logprobs"]]
        if [len(one) + 1 for one in scores] != [len(sequence) for sequence in sequences]:
            raise ServerTrouble(f"{self.url}: a damaged answer: scores of other lengths")
        return scores

    async def load(self, ref: AdapterRef, payload: Payload) -> str | None:
        """Install a version. Returns the digest of what the workers hold, if they can tell.

        A version that is there already is a success.
        """
        body = payload.data if payload.kind != BROADCAST else b""
        try:
            answer = await self.call("load", body, {"name": ref.served_name, "kind": payload.kind})
        except KeyError:
            if payload.kind != BROADCAST:
                raise
            # the server was started after the broadcast
            return await self.load(ref, Payload(BYTES, payload.data))
        with self.reading():
            return answer["digest"]

    async def unload(self, ref: AdapterRef) -> None:
        """Forget a version, its tensors included. Idempotent."""
        await self.call("unload", {"name": ref.served_name})

    async def status(self) -> Status:
        """Its counters; cheap, never behind generation."""
        try:
            found = await self.call("status", read_timeout=QUICK)
        except (KeyError, ValueError) as error:
            raise ServerTrouble(
                f"{self.url}: another server answers at its address ({error})"
            ) from error
        with self.reading():
            return Status(tokens_generated=int(found["tokens"]), adapters=tuple(found["adapters"]))

    async def facts(self, kind: str, how: str) -> dict[str, Any]:
        """What the server can do. Raises ValueError, with `how` to start it, without our routes."""
        try:
            return await self.call("facts", read_timeout=QUICK)
        except KeyError as error:
            raise ValueError(
                f"rollout.urls: {self.url} is no {kind} server with Lorelei's routes; {how}"
            ) from error

    async def call(
        self,
        route: str,
        body: Mapping[str, Any] | bytes | None = None,
        query: Mapping[str, str] | None = None,
        read_timeout: float | None = None,
    ) -> dict[str, Any]:
        """The JSON object that a route answers to a JSON object, or to bytes with a query."""
        url = f"{self.url}/lorelei/{route}"
        content: dict[str, Any]
        if isinstance(body, bytes):
            content = {"headers": {"Content-Type": "application/octet-stream"}, "content": body}
        else:
            content = {"json": dict(body or {})}
        if read_timeout is not None:
            content["timeout"] = httpx.Timeout(read_timeout, connect=CONNECT, pool=None)
        try:
            response = await self._http.post(f"/lorelei/{route}", params=query, **content)
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise ServerTrouble(f"POST {url}: {str(error) or type(error).__name__}") from error
        status = response.status_code
        try:
            answer: Any = json.loads(response.content or b"null")
        except ValueError as error:
            if status < 400:
                raise ServerTrouble(
                    f"POST {url}: the answer is not whole JSON ({error})"
                ) from error
            answer = response.text
        if status < 400 and isinstance(answer, dict) and "error" in answer:
            status = answer.get("status", 500)  # it failed after its answer had begun
        if status >= 400:
            raise _failure(status, f"POST {url}: {status}", _reason(answer))
        if not isinstance(answer, dict):
            raise ServerTrouble(f"a damaged answer: {str(answer)[:100]!r} is no JSON object")
        return answer

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Raises ServerTrouble for an answer that lacks something, or has it in another form."""
        try:
            yield
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ServerTrouble(f"{self.url}: a damaged answer: {error!r}") from error

    async def close(self) -> None:
        """Close the connections. Idempotent."""
        await self._http.aclose()


def served_name(ref: AdapterRef | None) -> str | None:
    """None: the base model."""
    return ref.served_name if ref is not None else None


def _sampling(params: SamplingParams, limit: int, seed: int) -> dict[str, Any]:
    return {
        "limit": limit,
        "seed": seed,
        "temperature": params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "min_p": params.min_p,
        "stop_token_ids": list(params.stop_token_ids),
        "stop_strings": list(params.stop_strings),
    }


def _failure(status: int, what: str, reason: str) -> Exception:
    if status >= 500 or status in _BUSY:
        return ServerTrouble(f"{what} {reason}")
    return KeyError(reason) if status == 404 else ValueError(reason)


def _reason(answer: Any) -> str:
    """What an error answer says; the servers' own put it in one of a few places."""
    for key in ("error", "message", "detail"):
        while isinstance(answer, dict) and key in answer:
            answer = answer[key]
    return str(answer)[:500]
