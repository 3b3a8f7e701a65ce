"""How a server with the routes under /lorelei is spoken to, of whichever kind it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lorelei.inference.server.backend import Group, Sampled, Status
from lorelei.inference.server.client import Client, ServerTrouble
from lorelei.inference.server.payload import pack
from lorelei.lora.state import AdapterState
from lorelei.types import AdapterRef, FinishReason, Floats, GenerateRequest, Ints

QUICK = 10.0  # seconds for an answer that waits for nothing
_REASONS: Mapping[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}


class Routed:
    """All of ServerBackend but what a kind of server has of its own: name, launch, facts."""

    __slots__ = ()

    @property
    def read_timeout(self) -> float:
        return 30.0  # a blank comes every three seconds

    async def warm_up(self, client: Client) -> None:
        body = _sampling(limit=2, seed=0, temperature=1.0)
        await client.post("/lorelei/generate", {**body, "tokens": [1, 2, 3], "adapter": None})

    async def generate(
        self, client: Client, request: GenerateRequest, limit: int, seed: int
    ) -> Sampled:
        sampling = request.sampling
        body = _sampling(
            limit=limit,
            seed=seed,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            stop_token_ids=list(sampling.stop_token_ids),
            stop_strings=list(sampling.stop_strings),
        )
        answer = await self._post(
            client,
            "generate",
            {**body, "tokens": request.tokens.tolist(), "adapter": _name(request.adapter)},
        )
        with reading(client):
            return Sampled(
                tokens=np.array(answer["tokens"], dtype=np.int32),
                logprobs=np.array(answer["logprobs"], dtype=np.float32),
                finish_reason=_REASONS[answer["finish_reason"]],
                served_name=answer["adapter"],
            )

    async def score(
        self,
        client: Client,
        sequences: Sequence[Ints],
        adapter: AdapterRef | None,
        temperature: float,
    ) -> list[Floats]:
        body = {
            "sequences": [sequence.tolist() for sequence in sequences],
            "adapter": _name(adapter),
            "temperature": temperature,
        }
        answer = await self._post(client, "score", body)
        with reading(client):
            scores = [np.array(one, dtype=np.float32) for one in answer["logprobs"]]
        if [len(one) + 1 for one in scores] != [len(sequence) for sequence in sequences]:
            raise ServerTrouble(f"{client.url}: a damaged answer: scores of other lengths")
        return scores

    async def load_bytes(self, client: Client, ref: AdapterRef, state: AdapterState) -> str | None:
        query = {"name": ref.served_name}
        answer = _whole(await client.post_bytes("/lorelei/load", pack(state), query))
        return _digest(client, answer)

    async def load_folder(self, client: Client, ref: AdapterRef, folder: Path) -> str | None:
        body = {"name": ref.served_name, "folder": str(folder)}
        return _digest(client, await self._post(client, "load_folder", body))

    async def join(self, client: Client, group: Group) -> None:
        await self._post(
            client,
            "join",
            {
                "name": group.name,
                "host": group.host,
                "port": group.port,
                "size": group.size,
                "first_rank": group.first_rank,
                "backend": group.backend,
                "timeout": group.timeout,
            },
        )

    async def receive(self, client: Client, ref: AdapterRef, group: str, size: int) -> None:
        body = {"name": ref.served_name, "group": group, "size": size}
        await self._post(client, "receive", body)

    async def load_received(self, client: Client, ref: AdapterRef) -> str | None:
        answer = await self._post(client, "load_received", {"name": ref.served_name})
        return _digest(client, answer)

    async def leave(self, client: Client, group: str) -> None:
        await self._post(client, "leave", {"group": group})

    async def unload(self, client: Client, ref: AdapterRef) -> None:
        await self._post(client, "unload", {"name": ref.served_name})

    async def pause(self, client: Client) -> None:
        await self._post(client, "pause")

    async def resume(self, client: Client) -> None:
        await self._post(client, "resume")

    async def abort(self, client: Client, adapter: AdapterRef | None = None) -> None:
        await self._post(client, "abort", {"adapter": _name(adapter)})

    async def sleep(self, client: Client) -> None:
        await self._post(client, "sleep")

    async def wake(self, client: Client) -> None:
        await self._post(client, "wake")

    async def status(self, client: Client) -> Status:
        try:
            found = _whole(await client.get("/lorelei/status", QUICK))
        except (KeyError, ValueError) as error:
            raise ServerTrouble(
                f"{client.url}: another server answers at its address ({error})"
            ) from error
        with reading(client):
            return Status(tokens_generated=int(found["tokens"]), adapters=tuple(found["adapters"]))

    async def _post(
        self, client: Client, route: str, body: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        return _whole(await client.post(f"/lorelei/{route}", body))


def _sampling(**given: Any) -> dict[str, Any]:
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "stop_token_ids": [], "stop_strings": []}
    return {**off, **given}


def _name(ref: AdapterRef | None) -> str | None:
    return ref.served_name if ref is not None else None


def _whole(answer: Any) -> dict[str, Any]:
    """An answer that had begun before it failed says so in its body."""
    if not isinstance(answer, dict):
        raise ServerTrouble(f"a damaged answer: {str(answer)[:100]!r} is no JSON object")
    if "error" in answer:
        match answer.get("status", 500):
            case 404:
                raise KeyError(answer["error"])
            case status if status < 500:
                raise ValueError(answer["error"])
            case _:
                raise ServerTrouble(answer["error"])
    return answer


def _digest(client: Client, answer: Mapping[str, Any]) -> str | None:
    with reading(client):
        return answer["digest"]


@contextmanager
def reading(client: Client) -> Iterator[None]:
    """Raises ServerTrouble for an answer that lacks something, or has it in another form."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ServerTrouble(f"{client.url}: a damaged answer: {error!r}") from error
