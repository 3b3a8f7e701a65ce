"""Runs inside SGLang's HTTP process: the routes under /lorelei, as an ASGI middleware.

The same as vLLM has from us: tokens in, tokens and log-probabilities out; adapters by bytes,
folder or broadcast.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from functools import cache
from typing import Any
from urllib.parse import parse_qs
from uuid import uuid4

from sglang.srt.entrypoints.http_server import get_global_state
from sglang.srt.managers.io_struct import (
    ContinueGenerationReqInput,
    GenerateReqInput,
    LoadLoRAAdapterFromTensorsReqInput,
    LoadLoRAAdapterReqInput,
    PauseGenerationReqInput,
    ReleaseMemoryOccupationReqInput,
    ResumeMemoryOccupationReqInput,
    UnloadLoRAAdapterReqInput,
)

from lorelei.inference.server.asgi import Exchange, Refused
from lorelei.inference.sglang.in_server import adapters
from lorelei.inference.sglang.in_server.counter import Counter, counter

PREFIX = "/lorelei/"

POLL = 0.005  # seconds between two looks
# SGLang forgets weights that it releases, unless it keeps a second copy of the base model
ASLEEP = ["kv_cache"]

Message = dict[str, Any]

_digests: dict[str, str] = {}  # of the adapters that are loaded, by name


class Routes:
    """ASGI middleware; all other paths are SGLang's. SGLang checks the token before."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(PREFIX):
            await self._app(scope, receive, send)
            return
        exchange = Exchange(receive, send)
        try:
            route = _ROUTES.get(scope["path"].removeprefix(PREFIX))
            if route is None:
                raise Refused(405, f"{scope['path']}: there is no such route")
            query = {k: v[0] for k, v in parse_qs(scope["query_string"].decode()).items()}
            await exchange.answer(route(query, await exchange.body()))
        except Refused as refused:
            await exchange.finish(refused.status, {"error": str(refused)})
        except asyncio.CancelledError:
            raise
        except ValueError as error:
            await exchange.finish(400, {"error": str(error)})
        except Exception as error:  # the border: whatever happens is the answer
            await exchange.finish(500, {"error": f"{type(error).__name__}: {error}"})


# --- sampling


async def generate(query: Message, body: bytes) -> Message:
    asked = json.loads(body)
    name = asked["adapter"]
    lora_id = _lora_id(name)
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
            "stop": asked["stop_strings"] if _manager().tokenizer is not None else [],
            "ignore_eos": True,  # what stops an answer is asked for
        },
        return_logprob=True,
        lora_path=name,
    )
    meta = (await _answer(request))["meta_info"]
    drawn = meta.get("output_token_logprobs", [])
    return {
        "tokens": [token for _, token, _ in drawn],
        "logprobs": [logprob for logprob, _, _ in drawn],
        "finish_reason": meta["finish_reason"]["type"],
        "adapter": name if request.lora_id == lora_id else request.lora_id,
    }


async def score(query: Message, body: bytes) -> Message:
    asked = json.loads(body)
    _lora_id(asked["adapter"])
    request = GenerateReqInput(
        rid=[uuid4().hex for _ in asked["sequences"]],
        input_ids=asked["sequences"],
        sampling_params={"max_new_tokens": 0, "temperature": asked["temperature"]},
        return_logprob=True,
        logprob_start_len=0,
        lora_path=asked["adapter"],
    )
    answers = await _answer(request) if asked["sequences"] else []
    scores = [
        # the first token has none
        [logprob for logprob, _, _ in answer["meta_info"]["input_token_logprobs"][1:]]
        for answer in answers
    ]
    return {"logprobs": scores}


async def _answer(request: GenerateReqInput) -> Any:
    stream = _manager().generate_request(request)
    try:
        return await anext(stream)
    finally:
        await stream.aclose()  # when the caller has hung up SGLang aborts the request


def _lora_id(name: str | None) -> str | None:
    """SGLang's id of a loaded adapter; it would look for others on the disk."""
    if name is None:
        return None
    if (ref := _manager().lora_registry.get_all_adapters().get(name)) is None:
        raise Refused(404, f"adapter {name} is not loaded")
    return ref.lora_id


# --- adapters


async def load(query: Message, body: bytes) -> Message:
    return await _load(query["name"], adapters.BYTES, body)


async def load_folder(query: Message, body: bytes) -> Message:
    asked = json.loads(body)
    name = asked["name"]
    if name not in _digests:
        order = LoadLoRAAdapterReqInput(lora_name=name, lora_path=asked["folder"])
        _note(name, await _manager().load_lora_adapter(order))
    return {"digest": _digests[name]}


async def join(query: Message, body: bytes) -> Message:
    return await _order(adapters.JOIN, body)


async def receive(query: Message, body: bytes) -> Message:
    return await _order(adapters.RECEIVE, body)


async def load_received(query: Message, body: bytes) -> Message:
    name = json.loads(body)["name"]
    while name not in _digests:
        found = await _order(adapters.ARRIVED, body)
        if found["standing"] == "missing":
            raise Refused(404, f"{name}: no broadcast has come: {found['why']}")
        if found["standing"] == "there":
            return await _load(name, adapters.RECEIVED, b"{}")
        await asyncio.sleep(POLL)
    return {"digest": _digests[name]}


async def leave(query: Message, body: bytes) -> Message:
    return await _order(adapters.LEAVE, body)


async def unload(query: Message, body: bytes) -> Message:
    """Forget an adapter when the last request with it has ended. Others may be loaded meanwhile.

    SGLang's own route keeps loads waiting, and brings a forgotten name back when it is asked for.
    """
    name = json.loads(body)["name"]
    manager = _manager()
    manager.lora_ref_cache.pop(name, None)
    _digests.pop(name, None)
    if name in manager.lora_registry.get_all_adapters():
        order = UnloadLoRAAdapterReqInput(lora_name=name)
        order.lora_id = await manager.lora_registry.unregister(name)
        await manager.lora_registry.wait_for_unload(order.lora_id)
        await _tell(order)
    return await _order(adapters.FORGET, body)


async def _load(name: str, how: str, payload: bytes) -> Message:
    if name not in _digests:
        order = _order_of(how, payload, name)
        _note(name, await _manager().load_lora_adapter_from_tensors(order))
    return {"digest": _digests[name]}


def _note(name: str, result: Any) -> None:
    if not result.success:
        raise Refused(422, result.error_message)
    _digests[name] = result.loaded_adapters[name]


async def _order(kind: str, payload: bytes) -> Message:
    """Have all scheduler processes do something that is not loading; the first one's answer."""
    return await _tell(_order_of(kind, payload, "-"))


def _order_of(kind: str, payload: bytes, name: str) -> LoadLoRAAdapterFromTensorsReqInput:
    return LoadLoRAAdapterFromTensorsReqInput(
        lora_name=name, config_dict={}, serialized_named_tensors=[payload], load_format=kind
    )


async def _tell(order: Any) -> Message:
    manager = _manager()
    async with manager.lora_update_lock:
        for result in await manager.update_lora_adapter_communicator(order):
            if not result.success:
                raise Refused(422, result.error_message)
    return result.loaded_adapters or {}


# --- control


async def pause(query: Message, body: bytes) -> Message:
    """Stop after the running step; answers when it has ended."""
    await _manager().pause_generation(PauseGenerationReqInput(mode="in_place"))
    await _manager().get_internal_state()  # answered between steps, in order
    return {}


async def resume(query: Message, body: bytes) -> Message:
    await _manager().continue_generation(ContinueGenerationReqInput())
    return {}


async def abort(query: Message, body: bytes) -> Message:
    """End all requests, or those of one adapter, also while paused; answers when they are over."""
    manager, name = _manager(), json.loads(body)["adapter"]
    states = manager.rid_to_state.items()
    aborted = {rid for rid, state in states if name in (None, state.obj.lora_path)}
    for rid in aborted:
        manager.abort_request(rid)
    paused = manager.is_pause
    if paused and aborted:  # a request that has begun ends with a step
        await resume(query, body)
    while not aborted.isdisjoint(manager.rid_to_state):
        await asyncio.sleep(POLL)
    if paused and aborted:
        await pause(query, body)
    return {}


async def sleep(query: Message, body: bytes) -> Message:
    """Give the accelerator's memory back; nothing may be running. A CPU server only pauses."""
    await pause(query, body)
    if _manager().server_args.device != "cpu":
        await _manager().release_memory_occupation(ReleaseMemoryOccupationReqInput(tags=ASLEEP))
    return {}


async def wake(query: Message, body: bytes) -> Message:
    if _manager().server_args.device != "cpu":
        await _manager().resume_memory_occupation(ResumeMemoryOccupationReqInput(tags=ASLEEP))
    return await resume(query, body)


async def status(query: Message, body: bytes) -> Message:
    names = sorted(_manager().lora_registry.get_all_adapters())
    return {"tokens": _tokens().value, "adapters": names}


async def facts(query: Message, body: bytes) -> Message:
    manager = _manager()
    return {
        "model": manager.server_args.model_path,
        "dtype": str(manager.model_config.dtype).removeprefix("torch."),
        "context": manager.context_len,
        "max_rank": manager.server_args.max_lora_rank,
        "workers": manager.server_args.tp_size,
        "device": manager.server_args.device,
        "stops_strings": manager.tokenizer is not None,
    }


def _manager() -> Any:
    state = get_global_state()
    if state is None:
        raise Refused(503, "the server is starting")
    return state.tokenizer_manager


@cache
def _tokens() -> Counter:
    return counter()


_ROUTES: dict[str, Callable[[Message, bytes], Awaitable[Message]]] = {
    route.__name__: route
    for route in (
        *(generate, score, load, load_folder, join, receive, load_received, leave, unload),
        *(pause, resume, abort, sleep, wake, status, facts),
    )
}
