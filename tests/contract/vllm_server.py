"""One vLLM server for the whole session, on a tiny model; engines attach to it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorelei.inference.limits import Limits
from lorelei.inference.server.client import Client, ServerTrouble
from lorelei.inference.server.engine import ServerEngine
from lorelei.inference.server.options import ServerOptions
from lorelei.inference.server.process import ServerProcess, free_port
from lorelei.inference.vllm.backend import VllmBackend
from tests.tiny_models import sizes_of

FAMILIES = ("llama", "qwen3", "qwen3_moe")
CONTEXT = 2048  # an answer of that length takes seconds, more than whoever aborts it is late
TOKEN = "a-token-of-the-tests"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningServer:
    """Where it is, and what it serves."""

    url: str
    model: Path
    folder: Path  # for logs
    context: int
    process: ServerProcess

    def engine(self, tokenizer: Any = None, max_running: int = 8, urls: Any = None) -> ServerEngine:
        """A new engine that attaches to it."""
        return ServerEngine(
            VllmBackend(None),
            Limits(vocab=300, context=self.context, decodes_text=tokenizer is not None),
            self.folder,
            tokenizer=tokenizer,
            urls=urls or [self.url],
            token=TOKEN,
            max_running=max_running,
        )


def options(model: Path, context: int, **changed: Any) -> ServerOptions:
    """Of a server on a tiny model."""
    given: dict[str, Any] = {
        "model": model,
        "sizes": sizes_of(model),
        "dtype": "float32",
        "context": context,
        "max_rank": 8,
        "target_modules": (),
        "versions": 12,
        "max_running": 32,
        "tensor_parallel": 1,
        "device": "cpu",
        "has_tokenizer": True,
        "threads": 1,
        "cpu_cache_gib": 1,
        "extra_args": {},
    }
    return ServerOptions(**{**given, **changed})


@contextmanager
def running_vllm(model: Path, folder: Path, context: int) -> Iterator[RunningServer]:
    """Start it, wait, and stop it."""
    port = free_port()
    launch = VllmBackend(options(model, context)).launch(0, port, TOKEN)
    process = ServerProcess(launch, folder / "vllm.log")
    url = f"http://127.0.0.1:{port}"
    try:
        asyncio.run(_up(url, process))
        yield RunningServer(url=url, model=model, folder=folder, context=context, process=process)
    finally:
        process.stop_now()


async def _up(url: str, process: ServerProcess) -> None:
    client = Client(url, TOKEN)
    try:
        for _ in range(600):
            assert process.alive, process.log_tail()
            try:
                await VllmBackend(None).workers(client)
                return
            except ServerTrouble:
                await asyncio.sleep(0.5)
        raise AssertionError(process.log_tail())
    finally:
        await client.close()
