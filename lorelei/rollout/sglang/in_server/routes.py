"""HTTP routes that SGLang's server lacks; for our own client on the loopback."""

from __future__ import annotations

import asyncio
import json
import struct
from functools import cache
from typing import Any

from fastapi import APIRouter, HTTPException, Request

from lorelei.rollout.sglang.in_server import adapters
from lorelei.rollout.sglang.in_server.counter import Counter, counter
from lorelei.types import AdapterSpec

# SGLang forgets weights that it releases, unless it keeps a second copy of the base model
_ASLEEP = ["kv_cache"]

router = APIRouter(prefix="/lorelei")

_digests: dict[str, str] = {}  # of the adapters that are loaded, by name


@router.get("/facts")
async def facts() -> dict[str, Any]:
    """What this server is."""
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


@router.get("/status")
async def status() -> dict[str, Any]:
    """Tokens sampled since the start, and the names of the adapters."""
    return {
        "tokens_generated": _tokens().value,
        "adapters": sorted(_manager().lora_registry.get_all_adapters()),
    }


@router.post("/generate")
async def generate(request: Request) -> dict[str, Any]:
    """One completion. Body: rid, tokens, adapter, and SGLang's sampling parameters.

    Answers tokens, logprobs, finish_reason and the adapter's name.
    """
    from sglang.srt.managers.io_struct import GenerateReqInput

    body = await request.json()
    name = body["adapter"]
    lora_id = _lora_id(name)
    asked = GenerateReqInput(
        rid=body["rid"],
        input_ids=body["tokens"],
        sampling_params=body["sampling"],
        return_logprob=True,
        lora_path=name,
    )
    answer = await _answer(asked, request)
    drawn = answer["meta_info"].get("output_token_logprobs", [])
    return {
        "tokens": [token for _, token, _ in drawn],
        "logprobs": [logprob for logprob, _, _ in drawn],
        "finish_reason": answer["meta_info"]["finish_reason"]["type"],
        "adapter": name if asked.lora_id == lora_id else asked.lora_id,
    }


@router.post("/score")
async def score(request: Request) -> list[list[float]]:
    """Log-probabilities of tokens 1.. of each of `sequences` under `adapter` at `temperature`."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    body = await request.json()
    _lora_id(body["adapter"])
    asked = GenerateReqInput(
        input_ids=body["sequences"],
        sampling_params={"max_new_tokens": 0, "temperature": body["temperature"]},
        return_logprob=True,
        logprob_start_len=0,
        lora_path=body["adapter"],
    )
    answers = await _answer(asked, request)
    return [
        # the first token has none
        [logprob for logprob, _, _ in answer["meta_info"]["input_token_logprobs"][1:]]
        for answer in answers
    ]


@router.post("/abort")
async def abort() -> dict[str, bool]:
    """End all requests, also while paused; answers when they have been answered."""
    from sglang.srt.managers.io_struct import ContinueGenerationReqInput

    manager = _manager()
    aborted = set(manager.rid_to_state)
    paused = manager.is_pause
    manager.abort_request(abort_all=True)
    if paused and aborted:  # a request that has begun ends with a step
        await manager.continue_generation(ContinueGenerationReqInput())
    while not aborted.isdisjoint(manager.rid_to_state):
        await asyncio.sleep(0.005)
    if paused and aborted:
        await pause()
    return {"aborted": True}


@router.post("/adapters/{name}")
async def load_adapter(name: str, request: Request) -> dict[str, str]:
    """Load a safetensors body; `spec` in its metadata has rank, alpha and rslora as JSON."""
    body = await request.body()
    header = _header(body)
    spec = AdapterSpec(**json.loads(header.pop("__metadata__")["spec"]))
    return await _load(name, spec, list(header), adapters.SAFETENSORS, body)


@router.post("/folders/{name}")
async def load_folder(name: str, request: Request) -> dict[str, str]:
    """Load the PEFT folder `path` of a JSON body."""
    from sglang.srt.managers.io_struct import LoadLoRAAdapterReqInput

    if name in _digests:
        return {"name": name, "digest": _digests[name]}
    path = (await request.json())["path"]
    order = LoadLoRAAdapterReqInput(lora_name=name, lora_path=path)
    return _loaded(name, await _manager().load_lora_adapter(order))


@router.post("/adapters/{name}/unload")
async def unload_adapter(name: str) -> dict[str, str]:
    """Forget an adapter when the last request with it has ended. Others may be loaded meanwhile.

    SGLang's own route keeps loads waiting, and brings a forgotten name back when it is asked for.
    """
    from sglang.srt.managers.io_struct import UnloadLoRAAdapterReqInput

    manager = _manager()
    manager.lora_ref_cache.pop(name, None)
    _digests.pop(name, None)
    if name not in manager.lora_registry.get_all_adapters():
        return {"name": name}
    order = UnloadLoRAAdapterReqInput(lora_name=name)
    order.lora_id = await manager.lora_registry.unregister(name)
    await manager.lora_registry.wait_for_unload(order.lora_id)
    async with manager.lora_update_lock:
        for result in await manager.update_lora_adapter_communicator(order):
            if not result.success:
                raise HTTPException(500, result.error_message)
    return {"name": name}


@router.post("/pause")
async def pause() -> dict[str, bool]:
    """Stop after the running step; answers when it has ended."""
    from sglang.srt.managers.io_struct import PauseGenerationReqInput

    await _manager().pause_generation(PauseGenerationReqInput(mode="in_place"))
    await _manager().get_internal_state()  # answered between steps, in order
    return {"paused": True}


@router.post("/resume")
async def resume() -> dict[str, bool]:
    """Undo `pause`."""
    from sglang.srt.managers.io_struct import ContinueGenerationReqInput

    await _manager().continue_generation(ContinueGenerationReqInput())
    return {"paused": False}


@router.post("/sleep")
async def sleep() -> dict[str, bool]:
    """Give the accelerator's memory back; nothing may be running. A CPU server only pauses."""
    from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput

    await pause()
    if _manager().server_args.device != "cpu":
        await _manager().release_memory_occupation(ReleaseMemoryOccupationReqInput(tags=_ASLEEP))
    return {"asleep": True}


@router.post("/wake")
async def wake() -> dict[str, bool]:
    """Undo `sleep`."""
    from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqInput

    if _manager().server_args.device != "cpu":
        await _manager().resume_memory_occupation(ResumeMemoryOccupationReqInput(tags=_ASLEEP))
    await resume()
    return {"asleep": False}


async def _load(
    name: str, spec: AdapterSpec, names: list[str], how: str, body: bytes
) -> dict[str, str]:
    from sglang.srt.managers.io_struct import LoadLoRAAdapterFromTensorsReqInput

    if name in _digests:
        return {"name": name, "digest": _digests[name]}
    order = LoadLoRAAdapterFromTensorsReqInput(
        lora_name=name,
        config_dict=adapters.adapter_config(spec, names),
        serialized_named_tensors=[body],
        load_format=how,
    )
    return _loaded(name, await _manager().load_lora_adapter_from_tensors(order))


def _loaded(name: str, result: Any) -> dict[str, str]:
    if not result.success:
        raise HTTPException(400, result.error_message)
    _digests[name] = result.loaded_adapters[name]
    return {"name": name, "digest": _digests[name]}


async def _answer(asked: Any, request: Request) -> Any:
    try:
        return await anext(_manager().generate_request(asked, request))
    except ValueError as error:
        raise HTTPException(400, str(error)) from error


def _lora_id(name: str | None) -> str | None:
    """SGLang's id of a loaded adapter; it asks for others on the disk."""
    if name is None:
        return None
    if (ref := _manager().lora_registry.get_all_adapters().get(name)) is None:
        raise HTTPException(404, f"adapter {name} is not loaded")
    return ref.lora_id


def _header(body: bytes) -> dict[str, Any]:
    """The JSON header of safetensors bytes."""
    (size,) = struct.unpack_from("<Q", body)
    return json.loads(body[8 : 8 + size])


def _manager() -> Any:
    from sglang.srt.entrypoints.http_server import get_global_state

    return get_global_state().tokenizer_manager


@cache
def _tokens() -> Counter:
    return counter()
