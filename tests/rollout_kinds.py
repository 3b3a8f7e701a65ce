"""The rollout engines that whole runs are tested on; a server is started once and attached to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lorelei.inference.server.backend import ServerBackend
from lorelei.inference.server.client import Client, ServerTrouble
from lorelei.inference.server.options import ServerOptions
from lorelei.inference.server.process import ServerProcess, free_port
from lorelei.inference.sglang.backend import SglangBackend
from lorelei.inference.vllm.backend import VllmBackend
from tests.environments import needs
from tests.tiny_models import sizes_of

ROLLOUTS = (
    "embedded",
    pytest.param("sglang", marks=(needs("sglang"), pytest.mark.matrix)),
    pytest.param("vllm", marks=needs("vllm")),
)
START = 240.0  # seconds
TOKEN = "of-these-runs"
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_OPTIONS: Mapping[str, Any] = {
    "dtype": "float32",
    "max_rank": 8,
    "target_modules": ALL_LINEAR,
    "versions": 4,
    "max_running": 32,
    "tensor_parallel": 1,
    "device": "cpu",
    "has_tokenizer": True,
    "threads": 1,
    "cpu_cache_gib": 1,
    "extra_args": {},
}


@contextmanager
def rollout_section(kind: str, model: Path, context: int) -> Iterator[Mapping[str, Any]]:
    """The `rollout` section of runs on a model, as long as their server is up.

    context: most tokens of a sequence.
    """
    if kind == "embedded":
        yield {"kind": kind}
        return
    options = ServerOptions(**_OPTIONS, model=model, sizes=sizes_of(model), context=context)
    backend: ServerBackend = VllmBackend(options) if kind == "vllm" else SglangBackend(options)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process = ServerProcess(backend.launch(0, port, TOKEN), model.parent / "log")
    try:
        asyncio.run(_up(backend, url, process))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LORELEI_SERVER_TOKEN", TOKEN)
            yield {"kind": kind, "urls": [url]}
    finally:
        process.stop_now()


async def _up(backend: ServerBackend, url: str, process: ServerProcess) -> None:
    client, deadline = Client(url, TOKEN), time.monotonic() + START
    try:
        while True:
            try:
                await backend.workers(client)
                return
            except ServerTrouble:
                assert process.alive and time.monotonic() < deadline, process.log_tail()
            await asyncio.sleep(0.2)
    finally:
        await client.close()
