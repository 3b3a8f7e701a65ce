"""A published version takes over answers that are being sampled, on every rollout engine."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorelei.inference.contract import InferenceEngine
from lorelei.lora.state import AdapterState
from lorelei.rollout.sampler import EngineSampler, Policy
from lorelei.types import AdapterRef, GenerateRequest, SamplingParams, Turn
from tests.contract.reference_rollout import reference_logprobs, reference_model
from tests.contract.servers import Servers
from tests.contract.test_rollout_contract import (
    ENGINES,
    LOGPROB_TOLERANCE,
    PROMPT,
    Make,
    make_ref,
    make_state,
    opened,
    run,
    until,
)
from tests.environments import needs

NEW_TOKENS = 180


@pytest.fixture
def folder(folders: dict[str, Path]) -> Path:
    return folders["llama"]


@pytest.fixture
def states(folder: Path) -> list[AdapterState]:
    return [make_state(folder, seed) for seed in (1, 2, 3)]


@pytest.fixture(params=[*sorted(ENGINES), pytest.param("sglang", marks=needs("sglang"))])
def make(request: pytest.FixtureRequest, servers: Servers, folder: Path) -> Make:
    if request.param in ENGINES:
        return ENGINES[request.param]
    servers.url(request.param, folder)
    return getattr(servers, request.param)


async def answers(
    engine: InferenceEngine, refs: list[AdapterRef], states: list[AdapterState], **fields: Any
) -> list[Turn]:
    """Three answers that start on the first version; each later one takes over in their midst."""
    sampling = SamplingParams(temperature=0.7, max_new_tokens=NEW_TOKENS, **fields)
    policy = Policy(
        ref=refs[0],
        sampling=sampling,
        stream="math",
        decode=lambda tokens: str(len(tokens)),
        interruptible=True,
    )
    await engine.load(refs[0], states[0])
    tasks = [asyncio.create_task(EngineSampler(engine, policy, str(n))(PROMPT)) for n in range(3)]
    for number, (ref, state) in enumerate(zip(refs[1:], states[1:], strict=True), start=1):

        async def sampled(least: int = 60 * number) -> bool:
            return (await engine.health()).tokens_generated >= least

        await until(sampled)
        await engine.load(ref, state)
        replaced, policy.ref = policy.ref, ref
        await engine.abort(replaced)
        assert replaced is not None
        await engine.unload(replaced)
    return await asyncio.gather(*tasks)


def test_every_token_is_of_the_version_that_its_span_names(
    make: Make, folder: Path, states: list[AdapterState]
) -> None:
    refs = [make_ref(state, version=n) for n, state in enumerate(states, start=4)]

    async def body() -> list[Turn]:
        async with opened(make(folder, None, 4)) as engine:
            return await answers(engine, refs, states)

    turns = run(body())
    models = {ref.version: reference_model(folder, s) for ref, s in zip(refs, states, strict=True)}
    for turn in turns:
        answer = turn.completion
        assert [version for version, _ in answer.versions] == [4, 5, 6]
        assert sum(count for _, count in answer.versions) == len(answer.tokens) == NEW_TOKENS
        assert len(answer.logprobs) == NEW_TOKENS and answer.finish_reason == "length"
        assert turn.text == str(NEW_TOKENS)
        whole, start = np.concatenate([PROMPT, answer.tokens]), len(PROMPT) - 1
        for version, count in answer.versions:
            assert count > 0
            # over 0.7, by adapters that make the logits larger
            theirs = reference_logprobs(models[version], whole, 0.7)[start : start + count]
            ours = answer.logprobs[start - len(PROMPT) + 1 :][:count]
            np.testing.assert_allclose(ours, theirs, atol=3 * LOGPROB_TOLERANCE)
            start += count
    assert len({turn.completion.tokens.tobytes() for turn in turns}) == 3


def test_an_interruption_by_equal_tensors_changes_no_token(
    make: Make, folder: Path, states: list[AdapterState]
) -> None:
    """The random number of a token follows from its position, whoever is asked for it."""
    same = [states[0]] * 3
    refs = [make_ref(states[0], version=n) for n in (4, 5, 6)]

    async def body() -> tuple[list[Turn], list[Turn]]:
        async with opened(make(folder, None, 4)) as engine:
            interrupted = await answers(engine, refs, same)
            return interrupted, await answers(engine, refs[:1], same[:1])

    interrupted, alone = run(body())
    assert {len(turn.completion.versions) for turn in interrupted} == {3}
    assert {len(turn.completion.versions) for turn in alone} == {1}
    equal = [
        np.array_equal(one.completion.tokens, other.completion.tokens)
        for one, other in zip(interrupted, alone, strict=True)
    ]
    # a number may fall on the border of two tokens, which fp32 sums in another order move
    assert sum(equal) >= 2


def test_a_stop_string_that_an_interruption_cuts_still_stops(
    make: Make, folder: Path, tiny_tokenizer: Any
) -> None:
    def ask(position: int, prompt: Any, **sampling: Any) -> GenerateRequest:
        params = SamplingParams(max_new_tokens=40 - position, **sampling)
        return GenerateRequest(
            tokens=prompt, adapter=None, sampling=params, key="k", position=position
        )

    async def body() -> None:
        async with opened(make(folder, tiny_tokenizer, 4)) as engine:
            free = (await engine.generate(ask(0, PROMPT))).tokens
            pieces = [tiny_tokenizer.decode([t]) for t in free]
            at = next(
                i
                for i in range(10, 39)
                if (pieces[i] + pieces[i + 1]).isascii()
                and pieces[i] + pieces[i + 1] not in tiny_tokenizer.decode(free[: i + 1])
            )
            stop = pieces[at] + pieces[at + 1]
            prompt = np.concatenate([PROMPT, free[: at + 1]])
            rest = await engine.generate(ask(at + 1, prompt, stop_strings=(stop,)))
            assert (rest.tokens.tolist(), rest.finish_reason) == ([free[at + 1]], "stop")

    run(body())


def test_an_abort_without_a_newer_version_ends_the_answer(
    make: Make, folder: Path, states: list[AdapterState]
) -> None:
    ref = make_ref(states[0])

    async def body() -> Turn:
        async with opened(make(folder, None, 4)) as engine:
            await engine.load(ref, states[0])
            policy = Policy(
                ref=ref,
                sampling=SamplingParams(max_new_tokens=NEW_TOKENS),
                stream="math",
                decode=str,
                interruptible=True,
            )
            task = asyncio.create_task(EngineSampler(engine, policy, "0")(PROMPT))

            async def sampled() -> bool:
                return (await engine.health()).tokens_generated >= 5

            await until(sampled)
            await engine.abort()
            return await task

    completion = run(body()).completion
    assert completion.finish_reason == "abort" and len(completion.tokens) < NEW_TOKENS
