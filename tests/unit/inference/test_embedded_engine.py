"""What is particular to the embedded engine; what all engines share is in tests/contract."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pytest
import torch

from lorelei.inference.contract import EngineClosed
from lorelei.inference.embedded.engine import EmbeddedEngine
from lorelei.inference.embedded.published import MERGE_STEPS
from lorelei.lora.bank import AdapterBank
from lorelei.lora.state import AdapterState
from lorelei.model import attention
from lorelei.model.decoder import Decoder
from lorelei.model.load import load_decoder
from lorelei.types import AdapterRef, AdapterSpec, Completion, GenerateRequest, SamplingParams
from tests.tiny_models import make_tiny

T = TypeVar("T")
PROMPTS = [np.arange(4 + i, 20 + 2 * i, dtype=np.int32) for i in range(4)]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return load_decoder(make_tiny("llama", tmp_path_factory.mktemp("model") / "llama"))


def run(body: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(body, 60))


def make_adapter(decoder: Decoder, seed: int = 0, name: str = "math") -> tuple[Any, AdapterState]:
    bank = AdapterBank(decoder)
    bank.add("x", AdapterSpec(rank=4, alpha=8.0), seed)
    state = bank.state("x")
    generator = torch.Generator().manual_seed(seed)
    for tensor_name, tensor in state.tensors.items():
        if "lora_B" in tensor_name:
            tensor.normal_(0, 0.1, generator=generator)
    return AdapterRef(name=name, version=1, run_id="r", digest=state.digest()), state


def ask(
    prompt: int = 0, key: str = "", adapter: AdapterRef | None = None, **sampling: Any
) -> GenerateRequest:
    return GenerateRequest(
        tokens=PROMPTS[prompt], adapter=adapter, sampling=SamplingParams(**sampling), key=key
    )


async def generate(engine: EmbeddedEngine, requests: list[GenerateRequest]) -> list[Completion]:
    return await asyncio.gather(*map(engine.generate, requests))


def bits(answers: list[Completion]) -> list[bytes]:
    return [a.tokens.tobytes() + a.logprobs.tobytes() for a in answers]


def test_samples_of_a_prompt_share_one_prefill_and_one_cache(decoder: Decoder) -> None:
    # 8 samples of each prompt through 3 slots: later samples find their prompt still there
    requests = [ask(p, f"{p}.{s}", max_new_tokens=1 + s) for p in range(4) for s in range(8)]

    async def body() -> int:
        engine = EmbeddedEngine(decoder, max_running=3)
        await generate(engine, requests)
        await engine.close()
        return engine._decoding.prompts_prefilled

    assert run(body()) == 4


def test_rows_decode_together_and_not_one_after_another(decoder: Decoder) -> None:
    async def body() -> int:
        engine = EmbeddedEngine(decoder, max_running=8)
        steps = 0
        step = engine._decoding.step

        def counted() -> Any:
            nonlocal steps
            steps += 1
            return step()

        engine._decoding.step = counted  # type: ignore[method-assign]
        await generate(engine, [ask(i % 4, str(i), max_new_tokens=10) for i in range(16)])
        await engine.close()
        return steps

    # two batches of 8 rows; a batch's first step gives its first two tokens
    assert run(body()) <= 2 * 9 + 1


def test_nothing_is_kept_when_the_last_row_has_left(decoder: Decoder) -> None:
    async def body() -> None:
        engine = EmbeddedEngine(decoder, max_running=4)
        tasks = [asyncio.create_task(engine.generate(ask(p, max_new_tokens=400))) for p in range(4)]
        while engine._decoding._cache.nbytes == 0:
            await asyncio.sleep(0)
        await engine.pause()
        assert engine._decoding._cache.nbytes > 0
        tasks[0].cancel()
        await engine.abort()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert engine._decoding._cache.nbytes == 0
        assert engine._decoding._plan is None
        assert engine._scheduler._prompts == {}
        await engine.close()

    run(body())


def test_merged_and_unmerged_decoding_agree(decoder: Decoder) -> None:
    ref, state = make_adapter(decoder)
    few = [ask(i, str(i), ref, max_new_tokens=MERGE_STEPS - 1) for i in range(2)]
    filler = ask(3, "filler", ref, max_new_tokens=400)

    async def body() -> tuple[list[Completion], list[Completion]]:
        engine = EmbeddedEngine(decoder, max_running=4)
        await engine.load(ref, state)
        unmerged = await generate(engine, few)
        assert engine._published._merged is None
        tasks = [asyncio.create_task(engine.generate(r)) for r in (*few, filler)]
        merged = await asyncio.gather(*tasks[:2])
        assert engine._published._merged is not None  # the filler is still running
        await engine.close()
        await asyncio.gather(*tasks, return_exceptions=True)
        return unmerged, merged

    for unmerged, merged in zip(*run(body()), strict=True):
        assert unmerged.tokens.tolist() == merged.tokens.tolist()
        assert np.allclose(unmerged.logprobs, merged.logprobs, 0, 1e-5)


def test_the_merged_copy_goes_when_nothing_runs_or_the_engine_sleeps(decoder: Decoder) -> None:
    ref, state = make_adapter(decoder)
    many = [ask(0, str(i), ref, max_new_tokens=200) for i in range(8)]

    async def body() -> None:
        engine = EmbeddedEngine(decoder, max_running=8)
        await engine.load(ref, state)
        tasks = [asyncio.create_task(engine.generate(request)) for request in many]
        while engine._published._merged is None:
            await asyncio.sleep(0.001)
        await engine.sleep()
        assert engine._published._merged is None
        await engine.wake()
        done = await asyncio.gather(*tasks)
        assert all(len(completion.tokens) == 200 for completion in done)
        assert engine._published._merged is None
        await engine.close()

    run(body())


def test_the_same_requests_give_the_same_bits_whatever_was_decoded_before(
    decoder: Decoder,
) -> None:
    ref, state = make_adapter(decoder)
    few = [ask(i, str(i), ref, max_new_tokens=12) for i in range(3)]
    many = [ask(i % 4, f"m{i}", ref, max_new_tokens=80) for i in range(8)]

    async def body() -> tuple[list[bytes], list[bytes]]:
        engine = EmbeddedEngine(decoder, max_running=8)
        await engine.load(ref, state)
        before = await generate(engine, few)
        await generate(engine, many)
        after = await generate(engine, few)
        await engine.close()
        return bits(before), bits(after)

    before, after = run(body())
    assert before == after


def test_the_path_of_other_devices_gives_the_same_answers(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [ask(i % 4, str(i), max_new_tokens=3 + 2 * i) for i in range(8)]

    async def body() -> list[Completion]:
        engine = EmbeddedEngine(decoder, max_running=5)
        answers = await generate(engine, requests)
        await engine.close()
        return answers

    fused = run(body())
    monkeypatch.setattr(attention, "fuses_attention", lambda device: False)
    for plain, expected in zip(run(body()), fused, strict=True):
        assert plain.tokens.tolist() == expected.tokens.tolist()
        assert np.allclose(plain.logprobs, expected.logprobs, 0, 1e-5)


def test_plain_attention_equals_the_fused_one() -> None:
    q, k, v = (torch.randn(3, 2, n, 32) for n in (4, 9, 9))
    mask = torch.zeros(3, 1, 1, 9).masked_fill_(
        torch.arange(9) > torch.tensor([[2], [8], [0]])[:, None, None], -torch.inf
    )
    for m in (None, mask):
        out, lse = attention.plain_attention_with_lse(q, k, v, m)
        fused_out, fused_lse = attention.attention_with_lse(q, k, v, m)
        assert torch.allclose(out, fused_out, atol=1e-6)
        assert torch.allclose(lse, fused_lse, atol=1e-6)


def test_load_returns_the_digest_of_what_it_installed_and_copies(decoder: Decoder) -> None:
    ref, state = make_adapter(decoder)

    async def body() -> tuple[list[bytes], list[bytes]]:
        engine = EmbeddedEngine(decoder)
        assert await engine.load(ref, state) == state.digest()
        assert await engine.load(ref, state) == state.digest()  # sent again
        before = await generate(engine, [ask(adapter=ref)])
        for tensor in state.tensors.values():
            tensor.zero_()
        after = await generate(engine, [ask(adapter=ref)])
        await engine.close()
        return bits(before), bits(after)

    before, after = run(body())
    assert before == after


@pytest.mark.parametrize("damage", ["missing", "shape", "nan", "target"])
def test_an_adapter_that_does_not_fit_is_refused_and_leaves_nothing(
    decoder: Decoder, damage: str
) -> None:
    ref, state = make_adapter(decoder)
    tensors = dict(state.tensors)
    name = next(iter(tensors))
    spec = state.spec
    match damage:
        case "missing":
            del tensors[name]
        case "shape":
            tensors[name] = tensors[name][:, :-1]
        case "nan":
            tensors[name] = tensors[name] * torch.nan
        case _:
            spec = replace(spec, target_modules=("q_prj",))

    async def body() -> None:
        engine = EmbeddedEngine(decoder)
        with pytest.raises(ValueError, match="q_prj" if damage == "target" else name):
            await engine.load(ref, AdapterState(spec=spec, tensors=tensors))
        assert (await engine.health()).adapters == ()
        assert await engine.load(ref, state) == state.digest()
        await engine.close()

    run(body())


def test_logits_that_are_not_finite_fail_their_request_and_no_other(decoder: Decoder) -> None:
    ref, state = make_adapter(decoder)
    huge = {n: t * 1e30 for n, t in state.tensors.items()}  # finite, but not its products

    async def body() -> list[Any]:
        engine = EmbeddedEngine(decoder)
        await engine.load(ref, AdapterState(spec=state.spec, tensors=huge))
        calls = (engine.generate(ask(adapter=a)) for a in (ref, None))
        results = await asyncio.gather(*calls, return_exceptions=True)
        await engine.close()
        return results

    bad, good = run(body())
    assert isinstance(bad, FloatingPointError)
    assert "math@v1" in str(bad)
    assert good.finish_reason == "length"


def test_an_error_on_the_decode_thread_reaches_everybody_who_waits(decoder: Decoder) -> None:
    class BrokenTokenizer:
        def decode(self, token_ids: Any, *, skip_special_tokens: bool) -> str:
            raise OSError("the disk is gone")

    async def body() -> None:
        engine = EmbeddedEngine(decoder, BrokenTokenizer(), max_running=2)
        requests = [ask(i, max_new_tokens=200) for i in range(3)]
        requests[1] = ask(1, stop_strings=("x",))
        results = await asyncio.gather(*map(engine.generate, requests), return_exceptions=True)
        for error in results:
            assert isinstance(error, EngineClosed)
            assert isinstance(error.__cause__, OSError)
        with pytest.raises(EngineClosed, match="the disk is gone"):
            await engine.generate(requests[0])
        assert not (await engine.health()).alive
        await engine.close()

    run(body())


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: 0"),
        ({"temperature": -1.0}, r"temperature: -1\.0"),
        ({"stop_strings": ("x",)}, "stop_strings.*tokenizer"),
    ],
)
def test_sampling_parameters_that_cannot_work_are_refused(
    decoder: Decoder, sampling: dict[str, Any], message: str
) -> None:
    async def body() -> None:
        engine = EmbeddedEngine(decoder)
        with pytest.raises(ValueError, match=message):
            await engine.generate(ask(**sampling))
        bad_tokens = replace(ask(), tokens=np.array([5, 300], dtype=np.int32))
        with pytest.raises(ValueError, match=r"from 5 to 300 .*\[0, 300\)"):
            await engine.generate(bad_tokens)
        await engine.close()

    run(body())
