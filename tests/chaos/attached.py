"""An engine that finds its server behind a proxy, and the oracle of its answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np

from lorelei.inference.limits import Limits
from lorelei.inference.server.engine import ServerEngine
from lorelei.inference.sglang.backend import SglangBackend
from lorelei.lora.state import AdapterState
from lorelei.types import AdapterRef, Completion, GenerateRequest
from tests.chaos.proxy import Json, Proxy
from tests.contract.reference_rollout import reference_logprobs, reference_model
from tests.contract.servers import TOKEN, VOCAB
from tests.contract.test_rollout_contract import close, whole
from tests.contract.vllm_server import CONTEXT

# a stuck connection is noticed soon: the answers of tiny models take no second
IMPATIENT = SglangBackend(None, read_timeout=2.0)


@asynccontextmanager
async def attached(
    server: str, folder: Path, rewrite: Callable[[str, Json], Json] = lambda route, asked: asked
) -> AsyncIterator[tuple[ServerEngine, Proxy]]:
    """An engine, started. No fault is in the proxy yet."""
    async with Proxy(server=server, rewrite=rewrite) as proxy:
        limits = Limits(vocab=VOCAB, context=CONTEXT, decodes_text=False)
        engine = ServerEngine(IMPATIENT, limits, folder, urls=[proxy.url], token=TOKEN)
        try:
            await engine.start()
            yield engine, proxy
        finally:
            proxy.faults.clear()
            await engine.close()


def right(
    folder: Path,
    states: Mapping[AdapterRef | None, AdapterState | None],
    requests: Sequence[GenerateRequest],
    answers: Sequence[Completion],
) -> bool:
    """Whether each request has its one answer, whole, sampled by the version it asked for."""
    models = {ref: reference_model(folder, state) for ref, state in states.items()}

    def is_right(request: GenerateRequest, answer: Completion) -> bool:
        count = request.sampling.max_new_tokens
        version = request.adapter.version if request.adapter is not None else 0
        logprobs = reference_logprobs(models[request.adapter], whole(request, answer), 1.0)
        return (
            answer.finish_reason == "length"
            and answer.versions == ((version, count),)
            and close(answer.logprobs, logprobs[len(request.tokens) - 1 :])
        )

    streams = {(a.tokens.tobytes(), np.float32(a.logprobs).tobytes()) for a in answers}
    return len(answers) == len(requests) == len(streams) and all(map(is_right, requests, answers))
