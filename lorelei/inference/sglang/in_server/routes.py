"""Runs inside SGLang's HTTP process: what it does for the routes under /lorelei."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from uuid import uuid4

from sglang.srt.entrypoints.http_server import get_global_state
from sglang.srt.managers.io_struct import (
    ContinueGenerationReqInput,
    GenerateReqInput,
    LoadLoRAAdapterFromTensorsReqInput,
    PauseGenerationReqInput,
    ReleaseMemoryOccupationReqInput,
    ResumeMemoryOccupationReqInput,
    UnloadLoRAAdapterReqInput,
)
from starlette.datastructures import State

from lorelei.inference.server.payload import BROADCAST
from lorelei.inference.server.routes import Json, Refused
from lorelei.inference.sglang.in_server import adapters
from lorelei.inference.sglang.in_server.counter import counter

POLL = 0.005  # seconds between two questions
# SGLang forgets weights that it releases, unless it keeps a second copy of the base model
ASLEEP = ["kv_cache"]


class SglangServer:
    """Implements routes.Server on SGLang's tokenizer manager."""

    def __init__(self, state: State) -> None:
        found = get_global_state()
        if found is None:
            raise Refused(503, "the server is starting")
        self._manager: Any = found.tokenizer_manager
        self.host: str = self._manager.server_args.host
        self._tokens = counter()
        self._digests: dict[str, str] = {}  # of the adapters that are loaded, by name

    # --- sampling

    async def generate(self, asked: Json) -> Json:
        name = asked["adapter"]
        lora_id = self._lora_id(name)
        request = GenerateReqInput(
            rid=uuid4().hex,
            input_ids=asked["tokens"],
            sampling_params={
                "temperature": asked["temperature"],
                "top_k": asked["top_k"] or -1,
                "top_p": asked["top_p"],
                "min_p": asked["min_p"],
                "max_new_tokens": asked["limit"],
                "sampling_seed": asked["seed"],
                "stop_token_ids": asked["stop_token_ids"],
                "stop": asked["stop_strings"] if self._manager.tokenizer is not None else [],
                "ignore_eos": True,  # what stops an answer is asked for
            },
            return_logprob=True,
            lora_path=name,
        )
        meta = (await self._answer(request))["meta_info"]
        drawn = meta.get("output_token_logprobs", [])
        return {
            "tokens": [token for _, token, _ in drawn],
            "logprobs": [logprob for logprob, _, _ in drawn],
            "finish_reason": meta["finish_reason"]["type"],
            "adapter": name if request.lora_id == lora_id else request.lora_id,
        }

    async def score(self, asked: Json) -> Json:
        self._lora_id(asked["adapter"])
        request = GenerateReqInput(
            rid=[uuid4().hex for _ in asked["sequences"]],
            input_ids=asked["sequences"],
            sampling_params={"max_new_tokens": 0, "temperature": asked["temperature"]},
            return_logprob=True,
            logprob_start_len=0,
            lora_path=asked["adapter"],
        )
        answers = await self._answer(request) if asked["sequences"] else []
        scores = [
            # the first token has none
            [logprob for logprob, _, _ in answer["meta_info"]["input_token_logprobs"][1:]]
            for answer in answers
        ]
        return {"logprobs": scores}

    async def _answer(self, request: GenerateReqInput) -> Any:
        stream = self._manager.generate_request(request)
        try:
            return await anext(stream)
        finally:
            await stream.aclose()  # when the caller has hung up SGLang aborts the request

    def _lora_id(self, name: str | None) -> str | None:
        """SGLang's id of a loaded adapter; it would look for others on the disk."""
        if name is None:
            return None
        if (ref := self._manager.lora_registry.get_all_adapters().get(name)) is None:
            raise Refused(404, f"adapter {name} is not loaded")
        return ref.lora_id

    # --- adapters

    async def load(self, asked: Json) -> Json:
        name, kind = asked["name"], asked["kind"]
        if kind == BROADCAST and name not in self._digests:
            await self._received(name)
        if name not in self._digests:
            order = _order(kind, asked["body"], name)
            result = await self._manager.load_lora_adapter_from_tensors(order)
            if not result.success:
                raise Refused(422, result.error_message)
            self._digests[name] = result.loaded_adapters[name]
        return {"digest": self._digests[name]}

    async def _received(self, name: str) -> None:
        """Wait for a broadcast. Raises Refused when none comes."""
        while (found := await self._control("arrived", {"name": name}))["standing"] != "there":
            if found["standing"] == "missing":
                raise Refused(404, f"{name}: no broadcast has come: {found['why']}")
            await asyncio.sleep(POLL)

    async def join(self, asked: Json) -> Json:
        return await self._control("join", asked)

    async def receive(self, asked: Json) -> Json:
        return await self._control("receive", asked)

    async def leave(self, asked: Json) -> Json:
        return await self._control("leave", asked)

    async def unload(self, asked: Json) -> Json:
        """Answers when the last request with the adapter has ended; others may be loaded meanwhile.

        SGLang's own route keeps loads waiting, and loads a forgotten name again when it is used.
        """
        name, manager = asked["name"], self._manager
        manager.lora_ref_cache.pop(name, None)
        self._digests.pop(name, None)
        if name in manager.lora_registry.get_all_adapters():
            order = UnloadLoRAAdapterReqInput(lora_name=name)
            order.lora_id = await manager.lora_registry.unregister(name)
            await manager.lora_registry.wait_for_unload(order.lora_id)
            await self._on_schedulers(order)
        return await self._control("forget", asked)

    async def _control(self, what: str, asked: Json) -> Json:
        """Have all scheduler processes do something that is not loading; the first one's answer."""
        return await self._on_schedulers(_order(what, json.dumps(asked).encode()))

    async def _on_schedulers(self, order: Any) -> Json:
        manager = self._manager
        async with manager.lora_update_lock:
            results = await manager.update_lora_adapter_communicator(order)
        for result in results:
            if not result.success:
                raise Refused(422, result.error_message)
        return results[0].loaded_adapters or {}

    # --- control

    async def pause(self, asked: Json) -> Json:
        """Stop after the running step; answers when it has ended."""
        await self._manager.pause_generation(PauseGenerationReqInput(mode="in_place"))
        await self._manager.get_internal_state()  # answered between steps, in order
        return {}

    async def resume(self, asked: Json) -> Json:
        await self._manager.continue_generation(ContinueGenerationReqInput())
        return {}

    async def abort(self, asked: Json) -> Json:
        """Also while paused; answers when the requests are over."""
        manager, name = self._manager, asked["adapter"]
        states = manager.rid_to_state.items()
        aborted = {rid for rid, state in states if name in (None, state.obj.lora_path)}
        for rid in aborted:
            manager.abort_request(rid)
        paused = manager.is_pause
        if paused and aborted:  # a request that has begun ends with a step
            await self.resume(asked)
        while not aborted.isdisjoint(manager.rid_to_state):
            await asyncio.sleep(POLL)
        if paused and aborted:
            await self.pause(asked)
        return {}

    async def sleep(self, asked: Json) -> Json:
        """Give the accelerator's memory back; nothing may be running. A CPU server only pauses."""
        await self.pause(asked)
        if self._manager.server_args.device != "cpu":
            await self._manager.release_memory_occupation(
                ReleaseMemoryOccupationReqInput(tags=ASLEEP)
            )
        return {}

    async def wake(self, asked: Json) -> Json:
        if self._manager.server_args.device != "cpu":
            await self._manager.resume_memory_occupation(
                ResumeMemoryOccupationReqInput(tags=ASLEEP)
            )
        return await self.resume(asked)

    async def status(self, asked: Json) -> Json:
        names = sorted(self._manager.lora_registry.get_all_adapters())
        return {"tokens": self._tokens.value, "adapters": names}

    async def facts(self, asked: Json) -> Json:
        arguments = self._manager.server_args
        return {"max_rank": arguments.max_lora_rank, "workers": arguments.tp_size}


def _order(what: str, payload: bytes, name: str = "-") -> LoadLoRAAdapterFromTensorsReqInput:
    """For `adapters`, in every scheduler process."""
    return LoadLoRAAdapterFromTensorsReqInput(
        lora_name=name,
        config_dict={},
        serialized_named_tensors=[payload or b"-"],
        load_format=adapters.SCHEME + what,
    )
