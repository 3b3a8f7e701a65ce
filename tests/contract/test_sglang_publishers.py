"""Every way of publishing, to real servers: what arrives is what was sent, and nothing is left."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lorelei.inference.server.engine import ServerEngine
from lorelei.lora.state import AdapterState
from lorelei.publish.contract import Transport
from lorelei.publish.disk import Disk
from lorelei.publish.publisher import Direct
from lorelei.publish.xccl import Xccl
from lorelei.types import Completion
from tests.contract.reference_rollout import reference_logprobs, reference_model
from tests.contract.servers import Servers
from tests.contract.test_rollout_contract import PROMPT, ask, close, make_ref, make_state, run
from tests.environments import needs

KINDS = [pytest.param("sglang", marks=needs("sglang"))]
WAYS: dict[str, Callable[[ServerEngine, Path], Transport]] = {
    "http": lambda engine, folder: Direct(engine),
    "disk": lambda engine, folder: Disk(engine, folder, "tiny"),
    "xccl": lambda engine, folder: Xccl(engine, torch.device("cpu"), "127.0.0.1", 20.0, print),
}
PUBLISHES, LIVE = 20, 8  # more than the server has room for: 12


@pytest.fixture(params=KINDS)
def engine(
    request: pytest.FixtureRequest, servers: Servers, folders: dict[str, Path]
) -> ServerEngine:
    servers.url(request.param, folders["llama"])
    engine = getattr(servers, request.param)(folders["llama"], None, 8)
    assert isinstance(engine, ServerEngine)
    return engine


@pytest.mark.parametrize("name", sorted(WAYS))
def test_what_a_server_scores_with_is_what_was_published(
    engine: ServerEngine, folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    states = [make_state(folders["llama"], seed) for seed in (1, 2, 3)]
    refs = [make_ref(state, version=v) for v, state in enumerate(states, start=1)]

    async def body() -> list[np.ndarray]:
        way = WAYS[name](engine, tmp_path / "published")
        try:
            for ref, state in zip(refs, states, strict=True):
                assert await way.send(ref, state) == ref.digest
            scores = [(await engine.score([PROMPT], ref))[0] for ref in refs]
            if isinstance(way, Xccl):
                assert (way.broadcasts, way.fallbacks) == (3, 0)
            for ref in refs:
                await way.unload(ref)
            assert (await engine.health()).adapters == ()
            return scores
        finally:
            await way.close()
            await engine.close()

    for state, score in zip(states, run(body()), strict=True):
        model = reference_model(folders["llama"], state)
        assert close(score, reference_logprobs(model, PROMPT, 1.0))
    assert not (tmp_path / "published").exists()


@pytest.mark.parametrize("name", sorted(WAYS))
def test_publishes_in_a_row_each_serve_their_version_and_leave_nothing(
    engine: ServerEngine, folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    states = [make_state(folders["llama"], seed) for seed in range(PUBLISHES)]
    refs = [make_ref(state, version=v) for v, state in enumerate(states)]

    async def body() -> list[Completion]:
        way = WAYS[name](engine, tmp_path / "published")
        asked: list[asyncio.Task[Completion]] = []
        try:
            for number, (ref, state) in enumerate(zip(refs, states, strict=True)):
                await way.send(ref, state)
                request = ask(adapter=ref, key=str(number), max_new_tokens=4)
                asked.append(asyncio.create_task(engine.generate(request)))
                if number >= LIVE:
                    await asked[number - LIVE]
                    await way.unload(refs[number - LIVE])
            answers = await asyncio.gather(*asked)
            for ref in refs[-LIVE:]:
                await way.unload(ref)
            (replica,) = engine.replicas
            status = await replica.client.status()
            assert not [a for a in status.adapters if "run1" in a]
            return answers
        finally:
            await way.close()
            await engine.close()

    for ref, answer in zip(refs, run(body()), strict=True):
        assert answer.versions == ((ref.version, 4),)
        assert answer.finish_reason == "length"
    last = run_alone(folders["llama"], states[-1], answer)
    assert close(answer.logprobs, last)
    assert not (tmp_path / "published").exists()


def run_alone(folder: Path, state: AdapterState, answer: Completion) -> np.ndarray:
    """What transformers and peft say of an answer."""
    sequence = np.concatenate([PROMPT, answer.tokens])
    return reference_logprobs(reference_model(folder, state), sequence, 1.0)[len(PROMPT) - 1 :]


@pytest.mark.parametrize("damage", ["shape", "name", "not finite"])
def test_an_adapter_that_would_be_served_wrongly_is_refused_and_others_go_on(
    engine: ServerEngine, folders: dict[str, Path], damage: str
) -> None:
    state = make_state(folders["llama"], 1)
    name = next(n for n in state.tensors if n.endswith("q_proj.lora_A.weight"))
    tensors = dict(state.tensors)
    match damage:
        case "shape":
            tensors[name] = tensors[name][:, :-1].contiguous()
        case "name":
            for matrix in ("lora_A", "lora_B"):
                here = name.replace("lora_A", matrix)
                tensors[here.replace("q_proj", "qq_proj")] = tensors.pop(here)
        case _:
            tensors[name] = torch.full_like(tensors[name], float("nan"))
    broken = AdapterState(spec=state.spec, tensors=tensors)

    async def body() -> None:
        good, bad = make_ref(state, "good"), make_ref(broken, "bad")
        try:
            assert await engine.load(good, state) == good.digest
            with pytest.raises(ValueError, match=r"q_proj|target modules"):
                await engine.load(bad, broken)
            assert (await engine.health()).adapters == (good.served_name,)
            assert len((await engine.generate(ask(adapter=good, max_new_tokens=3))).tokens) == 3
            await engine.unload(good)
        finally:
            await engine.close()

    run(body())
