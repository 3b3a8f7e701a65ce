"""Every way of publishing to a real server: the right version, verified, and nothing left."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch

from lorelei.inference.server.client import Client
from lorelei.inference.server.engine import ServerEngine
from lorelei.lora.state import AdapterState
from lorelei.publish.contract import Transport
from lorelei.publish.disk import Disk
from lorelei.publish.publisher import Direct, VersionPublisher
from lorelei.publish.xccl import Xccl
from tests.contract.reference_rollout import reference_logprobs, reference_model
from tests.contract.test_rollout_contract import PROMPT, ask, close, make_state
from tests.contract.vllm_server import TOKEN, RunningServer
from tests.environments import needs

pytestmark = needs("vllm")
T = TypeVar("T")
VERSIONS = 13  # more than the server has room for: 12


def make_transport(kind: str, engine: ServerEngine, folder: Path) -> Transport:
    match kind:
        case "http":
            return Direct(engine)
        case "disk":
            return Disk(engine, folder, "base")
        case _:
            return Xccl(engine, torch.device("cpu"), "127.0.0.1", 20.0, print)


def run(body: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(body, 90))


@pytest.mark.parametrize("kind", ["http", "disk", "xccl"])
def test_each_version_answers_as_itself_while_others_are_published(
    kind: str, vllm_server: RunningServer, tmp_path: Path
) -> None:
    async def body() -> None:
        engine = vllm_server.engine(max_running=8)
        transport = make_transport(kind, engine, tmp_path / "published")
        publisher = VersionPublisher(engine, "run9", transport)
        older = None
        for version in range(VERSIONS):
            state = make_state(vllm_server.model, version)
            # one long answer is sampled while the next version is published
            busy = asyncio.create_task(engine.generate(ask(adapter=older, max_new_tokens=24)))
            ref = (await publisher.publish({"a": version}, {"a": state}))["a"]
            answer = await engine.generate(ask(adapter=ref, max_new_tokens=8))
            assert (await busy).finish_reason == "length"
            assert answer.versions == ((version, 8),)
            if version % 6 == 0:
                model = reference_model(vllm_server.model, state)
                sequence = np.concatenate([PROMPT, answer.tokens])
                expected = reference_logprobs(model, sequence, 1.0)[len(PROMPT) - 1 :]
                assert close(answer.logprobs, expected)
            if older is not None:
                await publisher.retire(older)
            older = ref
        assert (await engine.health()).adapters == (older.served_name,)
        if isinstance(transport, Xccl):
            assert (transport.broadcasts, transport.fallbacks) == (VERSIONS, 0)
        await publisher.retire(older)
        status = await engine.replicas[0].client.status()
        assert status.adapters == ()
        await publisher.close()
        await engine.close()
        assert not list(tmp_path.rglob("*.safetensors"))

    run(body())


def test_an_adapter_that_does_not_fit_is_refused_and_the_server_lives_on(
    vllm_server: RunningServer,
) -> None:
    async def body() -> None:
        engine = vllm_server.engine()
        large = make_state(vllm_server.model, 1, rank=16)
        from tests.contract.test_rollout_contract import make_ref

        with pytest.raises(ValueError, match=r"rank 16 is more than the server's 8"):
            await engine.load(make_ref(large), large)
        odd = make_state(vllm_server.model, 1)
        tensors = {n.replace("layers.1", "layers.7"): t for n, t in odd.tensors.items()}
        odd = AdapterState(spec=odd.spec, tensors=tensors)
        with pytest.raises(ValueError, match=r"layers\.7.*has no LoRA layer"):
            await engine.load(make_ref(odd), odd)
        assert len((await engine.generate(ask(max_new_tokens=3))).tokens) == 3
        await engine.close()

    run(body())


@pytest.mark.parametrize("name", ["app", "_app", "_engine", "host", "_on_workers"])
def test_attributes_of_the_server_are_no_routes(vllm_server: RunningServer, name: str) -> None:
    async def body() -> None:
        client = Client(vllm_server.url, TOKEN)
        with pytest.raises(KeyError, match="there is no such route"):
            await client.call(name)
        await client.close()

    run(body())
