"""Rollout servers that several tests share: one of a kind and model in a session."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorelei.inference.contract import InferenceEngine
from lorelei.inference.limits import Limits
from lorelei.inference.server.engine import ServerEngine
from lorelei.inference.server.options import ServerOptions
from lorelei.inference.server.process import ServerProcess, free_port
from lorelei.inference.sglang.backend import SglangBackend
from tests.contract.vllm_server import CONTEXT
from tests.tiny_models import sizes_of

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
INNER = ("gate_proj", "up_proj", "down_proj")
VOCAB = 300
TOKEN = "of-this-session"


@dataclass(slots=True)
class Servers:
    """Starts what is asked for first; engines attach, so that closing one leaves its server."""

    _running: dict[tuple[str, Path], tuple[str, ServerProcess]] = field(default_factory=dict)

    def sglang(self, folder: Path, tokenizer: Any, max_running: int) -> InferenceEngine:
        """An engine attached to the session's SGLang server of that model."""
        return self._attached("sglang", folder, tokenizer, max_running)

    def url(self, kind: str, folder: Path) -> str:
        """Where the session's server of that model listens."""
        if (kind, folder) not in self._running:
            port = free_port()
            launch = SglangBackend(sglang_options(folder)).launch(0, port, TOKEN)
            process = ServerProcess(launch, folder.parent / f"{kind}-{folder.name}.log")
            self._running[kind, folder] = (f"http://127.0.0.1:{port}", process)
            # outside of the first test's deadline
            asyncio.run(self._ready(self._attached(kind, folder, None, 1), process))
        return self._running[kind, folder][0]

    def stop(self) -> None:
        for _, process in self._running.values():
            process.stop_now()
        self._running.clear()

    def _attached(self, kind: str, folder: Path, tokenizer: Any, max_running: int) -> ServerEngine:
        return ServerEngine(
            SglangBackend(None),
            Limits(vocab=VOCAB, context=CONTEXT, decodes_text=tokenizer is not None),
            folder,
            tokenizer=tokenizer,
            urls=[self.url(kind, folder)],
            token=TOKEN,
            max_running=max_running,
        )

    async def _ready(self, engine: ServerEngine, process: ServerProcess) -> None:
        started = asyncio.create_task(engine.start())
        while not started.done():
            assert process.alive, process.log_tail()
            await asyncio.wait({started}, timeout=1)
        await started
        await engine.close()


def sglang_options(folder: Path, **changed: Any) -> ServerOptions:
    """Of a server on a tiny model."""
    given: dict[str, Any] = {
        "model": folder,
        "sizes": sizes_of(folder),
        "dtype": "float32",
        "context": CONTEXT,
        "max_rank": 8,
        "target_modules": ATTENTION if "moe" in folder.name else ATTENTION + INNER,
        "versions": 12,
        "max_running": 32,
        "tensor_parallel": 1,
        "device": "cpu",
        "has_tokenizer": False,
        "threads": 1,
        "cpu_cache_gib": 1,
        "extra_args": {},
    }
    return ServerOptions(**{**given, **changed})
