"""How to speak to SGLang's server with our hooks in it."""

from __future__ import annotations

import asyncio
import json
import math
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save

from lorelei.lora.state import AdapterState
from lorelei.rollout.server.client import Client, ServerTrouble
from lorelei.rollout.server.dialect import Facts, Group, Sampled, Status
from lorelei.rollout.server.process import Launch
from lorelei.rollout.sglang.spec import LAUNCHER, SPARE, SglangSpec
from lorelei.types import AdapterRef, Floats, GenerateRequest, Ints, SamplingParams

SILENCE = 600.0  # seconds; answers come whole, and one may wait behind many others
UNLOAD = 3600.0  # seconds; SGLang lets what is in flight finish


class SglangDialect:
    """Dialect of SGLang started by our launcher."""

    name = "sglang"
    silence = SILENCE

    def __init__(self, spec: SglangSpec | None) -> None:
        """spec: none where servers are only attached to."""
        self._spec = spec

    def launch(self, number: int, port: int, token: str, folder: Path) -> Launch:
        if self._spec is None:
            raise ValueError("rollout.urls: servers that are attached to are not started here")
        return self._spec.launch(number, port, token)

    async def facts(self, client: Client) -> Facts:
        try:
            found = await client.get("/lorelei/facts")
        except KeyError as error:
            raise ValueError(
                f"{client.url}: this SGLang server lacks Lorelei's routes; start it with "
                f"`python -P -m {LAUNCHER}` and SGLang's own arguments"
            ) from error
        if found["max_rank"] is None:
            raise ValueError(f"{client.url}: start it with --enable-lora and --max-lora-rank")
        return Facts(**{**found, "context": found["context"] - SPARE}, receives=True)

    async def warm_up(self, client: Client) -> None:
        sampling = SamplingParams(max_new_tokens=2)
        prompt = np.array([1, 2, 3], dtype=np.int32)
        request = GenerateRequest(tokens=prompt, adapter=None, sampling=sampling, key="warm-up")
        await self.generate(client, request, 2, 0)

    async def generate(
        self, client: Client, request: GenerateRequest, limit: int, seed: int
    ) -> Sampled:
        sampling = request.sampling
        rid = uuid.uuid4().hex
        body = {
            "rid": rid,
            "tokens": request.tokens.tolist(),
            "adapter": _name(request.adapter),
            "sampling": {
                "temperature": sampling.temperature,
                "max_new_tokens": limit,
                "ignore_eos": True,  # stop at what is asked for, and at nothing else
                "stop_token_ids": list(sampling.stop_token_ids),
                "stop": list(sampling.stop_strings),
                "sampling_seed": _signed(seed),
                "top_k": sampling.top_k or -1,
                "top_p": sampling.top_p,
                "min_p": sampling.min_p,
            },
        }
        try:
            found = await client.post("/lorelei/generate", body, silence=SILENCE)
        except asyncio.CancelledError:
            # SGLang looks for lost connections every few seconds only
            abort = asyncio.ensure_future(client.post("/abort_request", {"rid": rid}))
            _background.add(abort)
            abort.add_done_callback(_forget)
            raise
        return _sampled(client, found)

    async def score(
        self,
        client: Client,
        sequences: Sequence[Ints],
        adapter: AdapterRef | None,
        temperature: float,
    ) -> list[Floats]:
        long = [sequence for sequence in sequences if len(sequence) > 1]
        found: list[Any] = []
        if long:
            body = {
                "sequences": [sequence.tolist() for sequence in long],
                "adapter": _name(adapter),
                "temperature": temperature,
            }
            found = await client.post("/lorelei/score", body, silence=SILENCE)
        scores = iter(found)
        return [
            _floats(client, next(scores), len(sequence) - 1)
            if len(sequence) > 1
            else np.zeros(0, dtype=np.float32)
            for sequence in sequences
        ]

    async def load_bytes(self, client: Client, ref: AdapterRef, state: AdapterState) -> str | None:
        body = await asyncio.to_thread(_packed, state)
        found = await client.post_bytes(f"/lorelei/adapters/{ref.served_name}", body, {})
        return found["digest"]

    async def load_folder(self, client: Client, ref: AdapterRef, folder: Path) -> str | None:
        path = {"path": str(folder.resolve())}
        found = await client.post(f"/lorelei/folders/{ref.served_name}", path)
        return found["digest"]

    async def join(self, client: Client, group: Group) -> None:
        raise NotImplementedError

    async def receive(
        self, client: Client, ref: AdapterRef, group: str, header: Mapping[str, Any]
    ) -> None:
        raise NotImplementedError

    async def load_received(self, client: Client, ref: AdapterRef) -> str | None:
        raise NotImplementedError

    async def leave(self, client: Client, group: str) -> None:
        raise NotImplementedError

    async def unload(self, client: Client, ref: AdapterRef) -> None:
        await client.post(f"/lorelei/adapters/{ref.served_name}/unload", silence=UNLOAD)

    async def pause(self, client: Client) -> None:
        await client.post("/lorelei/pause")

    async def resume(self, client: Client) -> None:
        await client.post("/lorelei/resume")

    async def abort(self, client: Client) -> None:
        await client.post("/lorelei/abort")

    async def sleep(self, client: Client) -> None:
        await client.post("/lorelei/sleep")

    async def wake(self, client: Client) -> None:
        await client.post("/lorelei/wake")

    async def status(self, client: Client) -> Status:
        found = await client.get("/lorelei/status")
        return Status(tokens_generated=found["tokens_generated"], adapters=tuple(found["adapters"]))


_background: set[asyncio.Future[Any]] = set()  # aborts that nobody waits for


def _forget(abort: asyncio.Future[Any]) -> None:
    _background.discard(abort)
    if not abort.cancelled():
        abort.exception()  # a server that is gone has aborted too


def _name(adapter: AdapterRef | None) -> str | None:
    return None if adapter is None else adapter.served_name


def _signed(seed: int) -> int:
    """The low 64 bits as a signed number."""
    low = seed & (1 << 64) - 1
    return low - (1 << 64) if low >> 63 else low


def _packed(state: AdapterState) -> bytes:
    spec = {"rank": state.spec.rank, "alpha": state.spec.alpha, "rslora": state.spec.rslora}
    return save(dict(state.tensors), metadata={"spec": json.dumps(spec)})


def _sampled(client: Client, found: Any) -> Sampled:
    try:
        tokens = np.array(found["tokens"], dtype=np.int32)
        return Sampled(
            tokens=tokens,
            logprobs=_floats(client, found["logprobs"], len(tokens)),
            finish_reason=found["finish_reason"],
            served_name=found["adapter"],
        )
    except (KeyError, TypeError) as error:
        raise ServerTrouble(f"{client.url}: an answer lacks what it must have: {error}") from error


def _floats(client: Client, values: Any, count: int) -> Floats:
    if len(values) != count or not all(
        isinstance(value, float | int) and math.isfinite(value) for value in values
    ):
        raise ServerTrouble(
            f"{client.url}: {count} tokens came with log-probabilities that are missing or not "
            "finite; does the adapter hold finite numbers?"
        )
    return np.array(values, dtype=np.float32)
