"""What every rollout engine must do. A new engine is one more entry of ENGINES."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from safetensors import safe_open

from lorelei.inference.contract import EngineClosed, InferenceEngine
from lorelei.inference.embedded.engine import EmbeddedEngine
from lorelei.lora.state import AdapterState, tensor_names
from lorelei.types import AdapterRef, AdapterSpec, Completion, GenerateRequest, Ints, SamplingParams
from tests.contract.reference_rollout import (
    ReferenceEngine,
    reference_logits,
    reference_logprobs,
    reference_model,
)
from tests.contract.servers import Servers
from tests.contract.vllm_server import CONTEXT, FAMILIES, RunningServer
from tests.decoders import load_decoder
from tests.environments import needs

# fp32 sums in another order: logits of this size (up to 8) agree to a few 1e-6
LOGPROB_TOLERANCE = 1e-5
PROMPT = np.arange(5, 22, dtype=np.int32)
ENDLESS = CONTEXT - len(PROMPT)  # tokens of an answer that nobody waits for

T = TypeVar("T")
Make = Callable[..., InferenceEngine]


def make_embedded(folder: Path, tokenizer: Any, max_running: int) -> InferenceEngine:
    return EmbeddedEngine(
        load_decoder(folder), tokenizer, max_running=max_running, max_context=CONTEXT
    )


def make_reference(folder: Path, tokenizer: Any, max_running: int) -> InferenceEngine:
    return ReferenceEngine(
        folder, tokenizer=tokenizer, max_running=max_running, max_context=CONTEXT
    )


ENGINES: dict[str, Make] = {"embedded": make_embedded, "reference": make_reference}
SERVERS = ("sglang", "vllm")  # one for the session and model; vLLM on the llama only


@pytest.fixture(
    params=[*sorted(ENGINES), *(pytest.param(kind, marks=needs(kind)) for kind in SERVERS)]
)
def make(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Make:
    if request.param in ENGINES:
        return ENGINES[request.param]
    family = request.node.callspec.params.get("family", "llama")
    # a server's start does not count as the test's time
    if request.param == "sglang":
        servers: Servers = request.getfixturevalue("servers")
        servers.url(request.param, folders[family])
        return servers.sglang

    def attach(folder: Path, tokenizer: Any, max_running: int) -> InferenceEngine:
        if folder.name != "llama":
            pytest.skip(f"the {request.param} server of the tests has the llama")
        server: RunningServer = request.getfixturevalue(f"{request.param}_server")
        return server.engine(tokenizer, max_running)

    if family != "llama":
        pytest.skip(f"the {request.param} server of the tests has the llama, not the {family}")
    request.getfixturevalue(f"{request.param}_server")
    return attach


def attention_only(make: Make, family: str) -> bool:
    """CPU servers adapt the attention of a mixture of experts, and no expert."""
    return isinstance(getattr(make, "__self__", None), Servers) and family == "qwen3_moe"


@asynccontextmanager
async def opened(engine: InferenceEngine) -> AsyncIterator[InferenceEngine]:
    try:
        yield engine
    finally:
        await engine.close()


def run(body: Coroutine[Any, Any, T]) -> T:
    """Nothing may hang."""
    return asyncio.run(asyncio.wait_for(body, 60))


def make_state(
    folder: Path, seed: int, rank: int = 8, attention_only: bool = False
) -> AdapterState:
    """An adapter on every linear layer but lm_head, large enough to change most answers."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            module, shape = name.removesuffix(".weight"), file.get_slice(name).get_shape()
            if not module.endswith("_proj") or len(shape) != 2:
                continue
            if attention_only and ".self_attn." not in module:
                continue
            a, b = tensor_names(module)
            tensors[a] = torch.randn(rank, shape[1], generator=generator) * shape[1] ** -0.5
            tensors[b] = torch.randn(shape[0], rank, generator=generator) * 0.1
    spec = AdapterSpec(rank=rank, alpha=2.0 * rank)
    return AdapterState(spec=spec, tensors=dict(sorted(tensors.items())))


def make_ref(state: AdapterState, name: str = "math", version: int = 3) -> AdapterRef:
    return AdapterRef(name=name, version=version, run_id="run1", digest=state.digest())


def ask(
    prompt: Ints = PROMPT, adapter: AdapterRef | None = None, key: str = "k", **sampling: Any
) -> GenerateRequest:
    return GenerateRequest(
        tokens=prompt, adapter=adapter, sampling=SamplingParams(**sampling), key=key
    )


def whole(request: GenerateRequest, completion: Completion) -> Ints:
    return np.concatenate([request.tokens, completion.tokens])


def close(got: np.ndarray, expected: np.ndarray) -> bool:
    return got.shape == expected.shape and np.allclose(got, expected, 0, LOGPROB_TOLERANCE)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    for _ in range(1000):
        if await condition():
            return
        await asyncio.sleep(0.01)  # a server that is asked all the time does little else
    raise AssertionError("it never happened")


async def sampled(engine: InferenceEngine, count: int) -> None:
    """Until the engine has sampled as many tokens since its start."""

    async def there() -> bool:
        return (await engine.health()).tokens_generated >= count

    await until(there)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers_generate(
    make: Make, folders: dict[str, Path], family: str, adapted: bool
) -> None:
    folder = folders[family]
    state = make_state(folder, 1, 8, attention_only(make, family)) if adapted else None

    async def body() -> list[Completion]:
        async with opened(make(folder, None, 4)) as engine:
            ref = None
            if state is not None:
                ref = make_ref(state)
                await engine.load(ref, state)
            prompts = (PROMPT, PROMPT[::-1].copy(), PROMPT[:1])
            requests = [ask(p, ref, temperature=0.0, max_new_tokens=12) for p in prompts]
            return await asyncio.gather(*map(engine.generate, requests))

    answers = run(body())
    model = reference_model(folder, state)
    model.generation_config.eos_token_id = None
    for prompt, answer in zip((PROMPT, PROMPT[::-1], PROMPT[:1]), answers, strict=True):
        ids = torch.from_numpy(prompt.copy()).long()[None]
        expected = model.generate(input_ids=ids, do_sample=False, max_new_tokens=12)[0]
        assert answer.tokens.tolist() == expected[len(prompt) :].tolist()
        logprobs = reference_logprobs(model, whole(ask(prompt), answer), 1.0)
        assert close(answer.logprobs, logprobs[len(prompt) - 1 :])  # greedy: of temperature 1


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_equal_a_plain_forward(
    make: Make, folders: dict[str, Path], family: str, temperature: float
) -> None:
    folder = folders[family]
    state = make_state(folder, 2, 8, attention_only(make, family))
    ref = make_ref(state)
    requests = [
        ask(PROMPT[:length], adapter, f"k{length}", temperature=temperature, max_new_tokens=20)
        for length, adapter in ((3, ref), (17, ref), (9, None))
    ]

    async def body() -> list[Completion]:
        async with opened(make(folder, None, 4)) as engine:
            await engine.load(ref, state)
            return await asyncio.gather(*map(engine.generate, requests))

    answers = run(body())
    models = {ref: reference_model(folder, state), None: reference_model(folder)}
    for request, answer in zip(requests, answers, strict=True):
        model = models[request.adapter]
        expected = reference_logprobs(model, whole(request, answer), temperature)
        assert len(answer.tokens) == 20
        assert answer.finish_reason == "length"
        assert answer.versions == ((3 if request.adapter else 0, 20),)
        assert close(answer.logprobs, expected[len(request.tokens) - 1 :])


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_ten_adapters_in_one_batch_each_answer_as_themselves(
    make: Make, folders: dict[str, Path], family: str
) -> None:
    folder = folders[family]
    attention = attention_only(make, family)
    states = [make_state(folder, seed, 4 + 2 * (seed % 3), attention) for seed in range(10)]
    refs = [make_ref(state, f"adapter-{i}") for i, state in enumerate(states)]
    # arriving interleaved, two prompts each
    requests = [ask(PROMPT[n:], ref, f"{n}", max_new_tokens=6) for n in (0, 4) for ref in refs]

    async def body() -> list[Completion]:
        async with opened(make(folder, None, 32)) as engine:
            for ref, state in zip(refs, states, strict=True):
                await engine.load(ref, state)
            return await asyncio.gather(*map(engine.generate, requests))

    answers = run(body())
    models = {ref: reference_model(folder, s) for ref, s in zip(refs, states, strict=True)}
    for request, answer in zip(requests, answers, strict=True):
        sequence, start = whole(request, answer), len(request.tokens) - 1
        own = reference_logprobs(models[request.adapter], sequence, 1.0)[start:]
        another = refs[(refs.index(request.adapter) + 1) % 10]
        others = reference_logprobs(models[another], sequence, 1.0)[start:]
        assert close(answer.logprobs, own)
        assert np.abs(answer.logprobs - others).max() > 0.05


def test_samples_of_one_prompt_equal_the_same_requests_alone(
    make: Make, folders: dict[str, Path]
) -> None:
    folder = folders["llama"]
    state = make_state(folder, 1)
    ref = make_ref(state)
    requests = [ask(adapter=ref, key=f"s{i}", max_new_tokens=5 + 3 * i) for i in range(6)]

    async def body() -> tuple[list[Completion], list[Completion]]:
        async with opened(make(folder, None, 8)) as engine:
            await engine.load(ref, state)
            together = await asyncio.gather(*map(engine.generate, requests))
            return together, [await engine.generate(request) for request in requests]

    for together, alone in zip(*run(body()), strict=True):
        assert together.tokens.tolist() == alone.tokens.tolist()
        assert close(together.logprobs, alone.logprobs)


def test_prompts_longer_than_a_step_draw_the_same_tokens(
    make: Make, folders: dict[str, Path]
) -> None:
    # together more than the 2048 tokens that vLLM takes in a step: one is computed in pieces
    prompts = [np.roll(np.resize(PROMPT, 248), n) for n in range(12)]
    requests = [ask(prompt, key=f"{n}", max_new_tokens=4) for n, prompt in enumerate(prompts)]

    async def body() -> tuple[list[Completion], list[Completion]]:
        async with opened(make(folders["llama"], None, 16)) as engine:
            together = await asyncio.gather(*map(engine.generate, requests))
            return together, [await engine.generate(request) for request in requests]

    for together, alone in zip(*run(body()), strict=True):
        assert together.tokens.tolist() == alone.tokens.tolist()


def test_finished_rows_leave_and_waiting_rows_enter(make: Make, folders: dict[str, Path]) -> None:
    folder = folders["llama"]
    # 7 prompts of different lengths, answers of 1 to 20 tokens: slots are freed in any order
    requests = [
        ask(PROMPT[i % 7 :], key=f"r{i}", max_new_tokens=1 + (7 * i) % 20) for i in range(20)
    ]
    seen: list[tuple[int, int]] = []

    async def body() -> list[Completion]:
        async with opened(make(folder, None, 4)) as engine:
            tasks = [asyncio.create_task(engine.generate(request)) for request in requests]
            while not all(task.done() for task in tasks):
                health = await engine.health()
                seen.append((health.running, health.waiting))
                await asyncio.sleep(0)
            health = await engine.health()
            assert (health.running, health.waiting) == (0, 0)
            assert health.tokens_generated == sum(r.sampling.max_new_tokens for r in requests)
            return [task.result() for task in tasks]

    answers = run(body())
    model = reference_model(folder)
    for request, answer in zip(requests, answers, strict=True):
        assert len(answer.tokens) == request.sampling.max_new_tokens
        expected = reference_logprobs(model, whole(request, answer), 1.0)
        assert close(answer.logprobs, expected[len(request.tokens) - 1 :])
    assert max(running for running, _ in seen) == 4
    assert (4, 10) in [(running, min(waiting, 10)) for running, waiting in seen]


def test_the_key_and_the_seed_name_the_random_stream(make: Make, folders: dict[str, Path]) -> None:
    async def body() -> list[list[int]]:
        async with opened(make(folders["llama"], None, 4)) as engine:
            requests = [ask(key="a"), ask(key="a"), ask(key="b"), ask(key="a", seed=1)]
            answers = await asyncio.gather(*map(engine.generate, requests))
            return [answer.tokens.tolist() for answer in answers]

    first, same, other_key, other_seed = run(body())
    assert first == same
    assert first != other_key
    assert first != other_seed


def test_the_same_batch_gives_the_same_bits_on_every_run(
    make: Make, folders: dict[str, Path]
) -> None:
    # which requests a server decodes together hangs on when they reach it, and with that the
    # last bits of its sums; only the engines in this process promise equal bits
    bits = make in ENGINES.values()
    state = make_state(folders["llama"], 4)
    ref = make_ref(state)
    requests = [
        ask(PROMPT[i % 3 :], (None, ref)[i % 2], f"{i}", max_new_tokens=3 + i) for i in range(9)
    ]

    async def body() -> list[Completion]:
        async with opened(make(folders["llama"], None, 3)) as engine:
            await engine.load(ref, state)
            return await asyncio.gather(*map(engine.generate, requests))

    for first, second in zip(run(body()), run(body()), strict=True):
        assert first.tokens.tolist() == second.tokens.tolist()
        assert close(first.logprobs, second.logprobs)
        assert not bits or first.logprobs.tobytes() == second.logprobs.tobytes()


def test_a_stop_token_ends_the_answer_and_is_kept(make: Make, folders: dict[str, Path]) -> None:
    async def body() -> tuple[Completion, Completion]:
        async with opened(make(folders["llama"], None, 4)) as engine:
            free = await engine.generate(ask(max_new_tokens=10))
            stops = (int(free.tokens[4]), 299)
            return free, await engine.generate(ask(max_new_tokens=10, stop_token_ids=stops))

    free, stopped = run(body())
    end = free.tokens.tolist().index(free.tokens[4]) + 1
    assert stopped.finish_reason == "stop"
    assert stopped.tokens.tolist() == free.tokens[:end].tolist()
    assert len(stopped.logprobs) == end


def test_a_stop_string_ends_the_answer_with_the_token_that_completes_it(
    make: Make, folders: dict[str, Path], tiny_tokenizer: Any
) -> None:
    async def body() -> tuple[Completion, Completion]:
        async with opened(make(folders["llama"], tiny_tokenizer, 4)) as engine:
            free = await engine.generate(ask(max_new_tokens=40))
            pieces = [tiny_tokenizer.decode([t]) for t in free.tokens[10:]]
            # two neighbouring tokens of plain ASCII: the string crosses their border
            at = next(i for i in range(29) if (pieces[i] + pieces[i + 1]).isascii())
            string = pieces[at] + pieces[at + 1]
            stopped = await engine.generate(ask(max_new_tokens=40, stop_strings=("\0\0", string)))
            return free, stopped

    free, stopped = run(body())
    count = len(stopped.tokens)
    assert stopped.finish_reason == "stop"
    assert count < 40
    assert stopped.tokens.tolist() == free.tokens[:count].tolist()


def test_the_context_ends_an_answer(make: Make, folders: dict[str, Path]) -> None:
    prompt = np.resize(PROMPT, CONTEXT - 3)

    async def body() -> Completion:
        async with opened(make(folders["llama"], None, 4)) as engine:
            return await engine.generate(ask(prompt, max_new_tokens=10))

    answer = run(body())
    assert (len(answer.tokens), answer.finish_reason) == (3, "length")


def test_abort_ends_all_requests_with_the_tokens_they_have(
    make: Make, folders: dict[str, Path]
) -> None:
    async def body() -> tuple[list[Completion], Completion, Completion]:
        async with opened(make(folders["llama"], None, 2)) as engine:
            tasks = [
                asyncio.create_task(engine.generate(ask(key=str(i), max_new_tokens=ENDLESS)))
                for i in range(5)
            ]
            await sampled(engine, 6)
            await engine.abort()
            aborted = await asyncio.gather(*tasks)
            # either of the two that ran may have been ahead
            longest = max(range(2), key=lambda i: len(aborted[i].tokens))
            count = len(aborted[longest].tokens)
            again = await engine.generate(ask(key=str(longest), max_new_tokens=count))
            assert again.tokens.tolist() == aborted[longest].tokens.tolist()
            return aborted, again, await engine.generate(ask(max_new_tokens=3))

    aborted, again, later = run(body())
    assert {answer.finish_reason for answer in aborted} == {"abort"}
    assert 3 <= len(again.tokens) < ENDLESS
    for waiting in aborted[2:]:
        assert len(waiting.tokens) == len(waiting.logprobs) == 0
        assert waiting.versions == ()
    assert later.finish_reason == "length"


def test_abort_of_one_version_leaves_the_requests_of_others(
    make: Make, folders: dict[str, Path]
) -> None:
    state = make_state(folders["llama"], seed=1)
    old, new = make_ref(state, version=1), make_ref(state, version=2)

    async def body() -> list[Completion]:
        async with opened(make(folders["llama"], None, 4)) as engine:
            for ref in (old, new):
                await engine.load(ref, state)

            def begin(ref: AdapterRef | None, count: int) -> asyncio.Task[Completion]:
                request = ask(adapter=ref, key="k", max_new_tokens=count)
                return asyncio.create_task(engine.generate(request))

            ended = begin(old, ENDLESS)
            await sampled(engine, 3)  # all of them its own
            others = [begin(new, 60), begin(None, 60)]
            await sampled(engine, 6)
            await engine.abort(old)
            return await asyncio.gather(ended, *others)

    answers = run(body())
    assert [answer.finish_reason for answer in answers] == ["abort", "length", "length"]
    count = len(answers[0].tokens)
    assert 0 < count < ENDLESS
    assert answers[0].tokens[:60].tolist() == answers[1].tokens[:count].tolist()


def test_cancelling_a_call_aborts_its_request_and_no_other(
    make: Make, folders: dict[str, Path]
) -> None:
    async def body() -> tuple[Completion, Completion]:
        async with opened(make(folders["llama"], None, 2)) as engine:
            running, kept, waiting = (
                asyncio.create_task(engine.generate(ask(key=key, max_new_tokens=count)))
                for key, count in (("running", ENDLESS), ("kept", 30), ("waiting", ENDLESS))
            )
            await sampled(engine, 4)
            running.cancel()
            waiting.cancel()
            answer = await kept

            async def empty() -> bool:
                health = await engine.health()
                return (health.running, health.waiting) == (0, 0)

            await until(empty)
            assert running.cancelled()
            assert waiting.cancelled()
            before = (await engine.health()).tokens_generated
            alone = await engine.generate(ask(key="kept", max_new_tokens=30))
            # the cancelled requests take no steps beside it
            assert (await engine.health()).tokens_generated - before < 60
            return answer, alone

    kept, alone = run(body())
    assert kept.tokens.tolist() == alone.tokens.tolist()
    assert close(kept.logprobs, alone.logprobs)


def test_pause_holds_requests_and_resume_loses_nothing(
    make: Make, folders: dict[str, Path]
) -> None:
    async def body() -> tuple[Completion, Completion]:
        async with opened(make(folders["llama"], None, 4)) as engine:
            task = asyncio.create_task(engine.generate(ask(max_new_tokens=ENDLESS)))
            await sampled(engine, 3)
            await engine.pause()
            await asyncio.sleep(0)  # an engine may end its running step first
            before = (await engine.health()).tokens_generated
            late = asyncio.create_task(engine.generate(ask(key="late", max_new_tokens=2)))
            await asyncio.sleep(0.05)
            assert (await engine.health()).tokens_generated == before
            assert not task.done()
            assert not late.done()
            await engine.resume()
            await late
            await sampled(engine, before + 10)
            await engine.abort()
            disturbed = await task
            assert len(disturbed.tokens) > before
            count = len(disturbed.tokens)
            return disturbed, await engine.generate(ask(max_new_tokens=count))

    disturbed, undisturbed = run(body())
    assert disturbed.tokens.tolist() == undisturbed.tokens.tolist()


def test_sleep_holds_requests_until_wake(make: Make, folders: dict[str, Path]) -> None:
    state = make_state(folders["llama"], 1)
    ref = make_ref(state)

    async def body() -> tuple[Completion, Completion]:
        async with opened(make(folders["llama"], None, 4)) as engine:
            await engine.load(ref, state)
            before = await engine.generate(ask(adapter=ref))
            await engine.sleep()
            task = asyncio.create_task(engine.generate(ask(adapter=ref)))
            await asyncio.sleep(0.02)
            assert not task.done()
            await engine.wake()
            return before, await task

    before, after = run(body())
    assert before.tokens.tolist() == after.tokens.tolist()


def test_unload_lets_requests_in_flight_finish_and_refuses_new_ones(
    make: Make, folders: dict[str, Path]
) -> None:
    state = make_state(folders["llama"], 1)
    ref = make_ref(state)

    async def body() -> tuple[Completion, Completion]:
        async with opened(make(folders["llama"], None, 1)) as engine:
            await engine.load(ref, state)
            whole_answer = await engine.generate(ask(adapter=ref, max_new_tokens=40))
            # the second request still waits for a slot when the version is unloaded
            requests = [ask(p, ref, max_new_tokens=40) for p in (PROMPT, PROMPT[3:])]
            tasks = [asyncio.create_task(engine.generate(request)) for request in requests]
            await asyncio.sleep(0)
            unloading = asyncio.create_task(engine.unload(ref))
            await asyncio.sleep(0)
            with pytest.raises(KeyError, match="math@v3"):
                await engine.generate(ask(adapter=ref))
            await unloading
            assert all(task.done() for task in tasks)
            answer, _ = await asyncio.gather(*tasks)
            assert (await engine.health()).adapters == ()
            with pytest.raises(KeyError):
                await engine.score([PROMPT], ref)
            with pytest.raises(KeyError):
                await engine.unload(ref)
            return whole_answer, answer

    undisturbed, in_flight = run(body())
    assert in_flight.tokens.tolist() == undisturbed.tokens.tolist()
    assert in_flight.finish_reason == "length"


def test_versions_of_one_adapter_are_served_side_by_side(
    make: Make, folders: dict[str, Path]
) -> None:
    folder = folders["llama"]
    states = [make_state(folder, seed) for seed in (1, 2)]
    refs = [make_ref(state, version=v) for v, state in enumerate(states, start=1)]

    async def body() -> list[Completion]:
        async with opened(make(folder, None, 4)) as engine:
            for ref, state in zip(refs, states, strict=True):
                assert await engine.load(ref, state) in (None, ref.digest)
            assert (await engine.health()).adapters == tuple(sorted(r.served_name for r in refs))
            requests = [ask(adapter=ref, max_new_tokens=8) for ref in refs]
            return await asyncio.gather(*map(engine.generate, requests))

    for ref, state, answer in zip(refs, states, run(body()), strict=True):
        expected = reference_logprobs(reference_model(folder, state), whole(ask(), answer), 1.0)
        assert answer.versions == ((ref.version, 8),)
        assert close(answer.logprobs, expected[len(PROMPT) - 1 :])


@pytest.mark.parametrize("family", FAMILIES)
def test_score_equals_what_generate_reported(
    make: Make, folders: dict[str, Path], family: str
) -> None:
    state = make_state(folders[family], 1, 8, attention_only(make, family))
    ref = make_ref(state)
    requests = [ask(PROMPT[i:], ref, str(i), temperature=0.8, max_new_tokens=9) for i in range(3)]

    async def body() -> None:
        async with opened(make(folders[family], None, 4)) as engine:
            await engine.load(ref, state)
            answers = await asyncio.gather(*map(engine.generate, requests))
            sequences = [whole(r, a) for r, a in zip(requests, answers, strict=True)]
            scores = await engine.score([*sequences, PROMPT[:1]], ref, 0.8)
            assert len(scores[3]) == 0
            for request, answer, score in zip(requests, answers, scores[:3], strict=True):
                assert close(answer.logprobs, score[len(request.tokens) - 1 :])
            base = await engine.score(sequences, None, 0.8)
            assert np.abs(base[0] - scores[0]).max() > 0.05

    run(body())


def test_score_equals_a_plain_forward(make: Make, folders: dict[str, Path]) -> None:
    async def body() -> np.ndarray:
        async with opened(make(folders["llama"], None, 4)) as engine:
            (score,) = await engine.score([PROMPT], None)
            return score

    logits = reference_logits(reference_model(folders["llama"]), PROMPT)
    expected = logits.log_softmax(-1)[torch.arange(16), torch.from_numpy(PROMPT[1:]).long()]
    assert close(run(body()), expected.numpy())


def test_prompts_that_do_not_fit_are_refused_by_length(
    make: Make, folders: dict[str, Path]
) -> None:
    async def body() -> None:
        async with opened(make(folders["llama"], None, 4)) as engine:
            for length in (CONTEXT, CONTEXT + 5):
                with pytest.raises(ValueError, match=rf"{length} tokens.* {CONTEXT}"):
                    await engine.generate(ask(np.resize(PROMPT, length)))
            with pytest.raises(ValueError, match="0 tokens"):
                await engine.generate(ask(PROMPT[:0]))
            with pytest.raises(KeyError, match="math@v3"):
                await engine.generate(ask(adapter=make_ref(make_state(folders["llama"], 1))))

    run(body())


def test_close_ends_pending_requests_and_may_be_called_again(
    make: Make, folders: dict[str, Path]
) -> None:
    async def body() -> None:
        engine = make(folders["llama"], None, 1)
        tasks = [
            asyncio.create_task(engine.generate(ask(key=str(i), max_new_tokens=200)))
            for i in range(3)
        ]
        await asyncio.sleep(0.01)
        await engine.close()
        await engine.close()
        for task in tasks:
            with pytest.raises(EngineClosed):
                await task
        with pytest.raises(EngineClosed):
            await engine.generate(ask())
        assert not (await engine.health()).alive

    started = time.perf_counter()
    run(body())
    assert time.perf_counter() - started < 10
