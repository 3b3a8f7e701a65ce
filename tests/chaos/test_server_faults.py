"""A server that answers wrongly, or not at all: a right answer in the end, or an error that says
what is wrong; never wrong data, never a hang."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorelei.inference.server.client import ServerTrouble
from lorelei.inference.server.engine import ServerEngine
from lorelei.lora.state import AdapterState
from lorelei.publish.xccl import Xccl
from lorelei.types import AdapterRef
from tests.chaos.attached import attached, right
from tests.chaos.proxy import ALWAYS, Fault, Json, Kind
from tests.contract.reference_rollout import reference_logprobs, reference_model
from tests.contract.servers import Servers
from tests.contract.test_rollout_contract import PROMPT, ask, close, make_ref, make_state, run
from tests.environments import needs

pytestmark = needs("sglang")
TOKENS = 6

KINDS: tuple[Kind, ...] = ("refused", "500", "500 after", "cut", "half", "stuck")


def without(name: str) -> Callable[[Json], Any]:
    return lambda answer: {key: value for key, value in answer.items() if key != name}


def changed(**fields: Any) -> Callable[[Json], Any]:
    return lambda answer: {**answer, **fields}


# what no generated answer may be
WRONG: dict[str, tuple[Callable[[Json], Any], str]] = {
    "no log-probabilities": (without("logprobs"), "a damaged answer: KeyError('logprobs')"),
    "one log-probability less": (
        lambda answer: {**answer, "logprobs": answer["logprobs"][1:]},
        f"{TOKENS - 1} log-probabilities for {TOKENS} tokens",
    ),
    "a log-probability is null": (
        lambda answer: {**answer, "logprobs": [None, *answer["logprobs"][1:]]},
        "log-probabilities are not finite",
    ),
    "no tokens": (without("tokens"), "a damaged answer: KeyError('tokens')"),
    "fewer tokens": (
        lambda a: {**a, "tokens": a["tokens"][:3], "logprobs": a["logprobs"][:3]},
        f"3 tokens where nothing but the limit of {TOKENS} ends the answer",
    ),
    "a token of another model": (
        changed(tokens=[1000] * TOKENS),
        "a token that is not in [0, 300)",
    ),
    "text for tokens": (changed(tokens="six tokens"), "a damaged answer: ValueError"),
    "another adapter answered": (changed(adapter="other"), "other answered for math-v3"),
    "the base answered": (changed(adapter=None), "None answered for math-v3"),
    "it was ended by nobody": (changed(finish_reason="abort"), "ended the request by itself"),
    "a list": (lambda answer: [answer], "is no JSON object"),
    "a late failure": (lambda answer: {"error": "out of memory", "status": 500}, "out of memory"),
}


@pytest.fixture
def place(servers: Servers, folders: dict[str, Path]) -> tuple[str, Path]:
    """(URL of a server, the folder of its model)."""
    return servers.url("sglang", folders["llama"]), folders["llama"]


@pytest.fixture(scope="module")
def state(folders: dict[str, Path]) -> AdapterState:
    return make_state(folders["llama"], 1)


@pytest.mark.parametrize("fault", [*KINDS, *WRONG])
def test_a_request_that_failed_once_gets_the_answer_of_one_that_did_not(
    place: tuple[str, Path], state: AdapterState, fault: str
) -> None:
    url, folder = place
    kind: Any = WRONG[fault][0] if fault in WRONG else fault

    async def body() -> None:
        async with attached(url, folder) as (engine, proxy):
            ref = make_ref(state)
            await engine.load(ref, state)
            request = ask(adapter=ref, max_new_tokens=TOKENS)
            expected = await engine.generate(request)
            proxy.faults.append(Fault(route="generate", kind=kind))
            answer = await engine.generate(request)
            assert proxy.seen["generate"] == 1 + 1 + 2, "a warm-up, an answer, a failure and a try"
            assert answer.tokens.tolist() == expected.tokens.tolist()
            assert right(folder, {ref: state}, [request], [answer])

    run(body())


@pytest.mark.parametrize("fault", [*KINDS, "no scores", "one score less", "a score is null"])
def test_scores_that_failed_once_are_asked_for_again(
    place: tuple[str, Path], state: AdapterState, fault: str
) -> None:
    url, folder = place
    damages: dict[str, Callable[[Json], Any]] = {
        "no scores": without("logprobs"),
        "one score less": lambda answer: {"logprobs": [answer["logprobs"][0][1:]]},
        "a score is null": lambda answer: {"logprobs": [[None, *answer["logprobs"][0][1:]]]},
    }
    kind: Any = damages.get(fault, fault)

    async def body() -> Any:
        async with attached(url, folder) as (engine, proxy):
            ref = make_ref(state)
            await engine.load(ref, state)
            proxy.faults.append(Fault(route="score", kind=kind))
            (score,) = await engine.score([PROMPT], ref)
            assert proxy.seen["score"] == 2
            return score

    expected = reference_logprobs(reference_model(folder, state), PROMPT, 1.0)
    assert close(run(body()), expected)


@pytest.mark.parametrize("fault", [*KINDS, "no digest"])
def test_a_load_that_failed_once_is_repeated(
    place: tuple[str, Path], state: AdapterState, fault: str
) -> None:
    url, folder = place
    kind: Any = without("digest") if fault == "no digest" else fault

    async def body() -> None:
        async with attached(url, folder) as (engine, proxy):
            ref = make_ref(state)
            proxy.faults.append(Fault(route="load", kind=kind))
            assert await engine.load(ref, state) == ref.digest
            assert proxy.seen["load"] == 2
            request = ask(adapter=ref, max_new_tokens=TOKENS)
            assert right(folder, {ref: state}, [request], [await engine.generate(request)])

    run(body())


def test_what_always_fails_ends_in_an_error_that_says_how(
    place: tuple[str, Path], state: AdapterState
) -> None:
    url, folder = place
    generate: dict[Any, str] = {
        "500": "500 Internal Server Error",
        "half": "the answer is not whole JSON",
        "cut": "peer closed connection",
        "stuck": "ReadTimeout",
        **dict(WRONG.values()),
    }

    async def generating(number: int, kind: Any, said: str) -> None:
        async with attached(url, folder) as (engine, proxy):
            ref = replace(make_ref(state), run_id=f"run{number}")
            await engine.load(ref, state)
            proxy.faults.append(Fault(route="generate", kind=kind, times=ALWAYS))
            start = time.monotonic()
            with pytest.raises(ServerTrouble, match="math@v3: 5 attempts failed") as caught:
                await engine.generate(ask(adapter=ref, max_new_tokens=TOKENS))
            assert said in str(caught.value)
            assert time.monotonic() - start < 30
            proxy.faults.clear()
            await engine.generate(ask(adapter=ref, max_new_tokens=TOKENS))

    async def loading(number: int, kind: Any, said: str) -> None:
        async with attached(url, folder) as (engine, proxy):
            ref = replace(make_ref(state), run_id=f"load{number}")
            proxy.faults.append(Fault(route="load", kind=kind, times=ALWAYS))
            with pytest.raises(ServerTrouble, match="loading math-v3") as caught:
                await engine.load(ref, state)
            assert said in str(caught.value)
            (replica,) = engine.replicas
            status = await replica.client.status()
            assert ref.served_name not in status.adapters, "none has it"
            with pytest.raises(KeyError, match="is not loaded"):
                await engine.generate(ask(adapter=ref))

    async def body() -> None:
        loads = {"500 after": "500 Internal", "stuck": "ReadTimeout"}
        await asyncio.gather(
            *(generating(n, kind, said) for n, (kind, said) in enumerate(generate.items())),
            *(loading(n, kind, said) for n, (kind, said) in enumerate(loads.items())),
        )

    run(body())


@pytest.mark.parametrize("times", [2, 3])
def test_a_server_that_fails_health_checks_is_attached_to_again(
    place: tuple[str, Path], state: AdapterState, times: int
) -> None:
    """Two failed checks are forgiven; after the third everything is loaded anew."""
    url, folder = place

    async def body() -> None:
        async with attached(url, folder) as (engine, proxy):
            ref, (replica,) = make_ref(state), engine.replicas
            await engine.load(ref, state)
            kinds: list[Any] = [without("adapters"), lambda answer: [answer], "half"]
            proxy.faults += [Fault(route="status", kind=kind) for kind in kinds[:times]]
            proxy.faults.append(Fault(route="generate", kind="500"))
            request = ask(adapter=ref, max_new_tokens=TOKENS)
            answer = await engine.generate(request)
            assert right(folder, {ref: state}, [request], [answer])
            assert replica.incarnation == (2 if times == 3 else 1)
            assert (await engine.health()).adapters == (ref.served_name,)

    run(body())


@pytest.mark.parametrize("call", ["generate", "score"])
def test_a_server_that_forgot_a_version_is_given_it_again(
    place: tuple[str, Path], state: AdapterState, call: str
) -> None:
    """As one that was restarted behind our back."""
    url, folder = place

    async def body() -> None:
        async with attached(url, folder) as (engine, _):
            ref, (replica,) = make_ref(state), engine.replicas
            await engine.load(ref, state)
            await replica.client.unload(ref)
            if call == "generate":
                request = ask(adapter=ref, max_new_tokens=TOKENS)
                assert right(folder, {ref: state}, [request], [await engine.generate(request)])
            else:
                (score,) = await engine.score([PROMPT], ref)
                model = reference_model(folder, state)
                assert close(score, reference_logprobs(model, PROMPT, 1.0))

    run(body())


@pytest.mark.parametrize(
    ("route", "kind"),
    [("join", "500"), ("receive", "500"), ("receive", "500 after"), ("load", "half")],
)
def test_a_broadcast_that_fails_is_told_once_and_the_next_one_works(
    place: tuple[str, Path], folders: dict[str, Path], route: str, kind: Kind
) -> None:
    url, folder = place
    states = [make_state(folder, seed) for seed in (1, 2, 3, 4)]
    refs = [make_ref(state, version=v) for v, state in enumerate(states)]
    warnings: list[str] = []

    async def send(way: Xccl, number: int, engine: ServerEngine) -> None:
        ref: AdapterRef = refs[number]
        assert await way.send(ref, states[number]) == ref.digest
        request = ask(adapter=ref, max_new_tokens=TOKENS)
        assert right(folder, {ref: states[number]}, [request], [await engine.generate(request)])

    async def body() -> None:
        async with attached(url, folder) as (engine, proxy):
            way = Xccl(engine, torch.device("cpu"), "127.0.0.1", 20.0, warnings.append)
            start = time.monotonic()
            for number in (0, 1):
                proxy.faults.append(Fault(route=route, kind=kind))
                await send(way, number, engine)
            assert time.monotonic() - start < 15, "nobody waited for a broadcast that never comes"
            if route == "load":  # the broadcast itself went well
                assert (way.broadcasts, way.metrics) == (2, {"publish_fallbacks": 0})
                assert warnings == []
            else:
                assert (way.broadcasts, way.metrics) == (0, {"publish_fallbacks": 2})
                (warning,) = warnings
                assert "math@v0" in warning and "500" in warning and "as bytes" in warning
            for number in (2, 3):
                await send(way, number, engine)
            assert way.broadcasts >= 2
            await way.close()

    run(body())
