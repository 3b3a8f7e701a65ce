"""HTTP routes that SGLang's server lacks; for our own client on the loopback."""

from __future__ import annotations

import json
import struct
from functools import cache
from typing import Any

from fastapi import APIRouter, HTTPException, Request

from lorelei.rollout.sglang.in_server import adapters
from lorelei.rollout.sglang.in_server.counter import Counter, counter
from lorelei.types import AdapterSpec

router = APIRouter(prefix="/lorelei")


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

    path = (await request.json())["path"]
    order = LoadLoRAAdapterReqInput(lora_name=name, lora_path=path)
    return _loaded(name, await _manager().load_lora_adapter(order))


@router.delete("/adapters/{name}")
async def unload_adapter(name: str) -> dict[str, str]:
    """Forget an adapter when the last request with it has ended. Others may be loaded meanwhile.

    SGLang's own route keeps loads waiting, and brings a forgotten name back when it is asked for.
    """
    from sglang.srt.managers.io_struct import UnloadLoRAAdapterReqInput

    manager = _manager()
    manager.lora_ref_cache.pop(name, None)
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


async def _load(
    name: str, spec: AdapterSpec, names: list[str], how: str, body: bytes
) -> dict[str, str]:
    from sglang.srt.managers.io_struct import LoadLoRAAdapterFromTensorsReqInput

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
    return {"name": name, "digest": result.loaded_adapters[name]}


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
