"""The canary against a real engine that is told to lie: each lie is caught, no step is committed.

The lies go through real loads: the embedded engine holds and serves what it must not.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lorelei.inference.embedded.engine import EmbeddedEngine
from lorelei.launch.assemble import RunComponents
from lorelei.loop import Loop
from lorelei.lora.state import AdapterState
from lorelei.publish.page import CanaryFailed
from lorelei.publish.random_adapter import random_adapter
from lorelei.run_file import load_config
from lorelei.store.check import check_run
from lorelei.types import AdapterRef, Completion, Floats, GenerateRequest, Ints
from tests.loops import digest, open_loop, versions, whole
from tests.tiny_runs import make_workplace, records, write_run


class Liar(EmbeddedEngine):
    """Tells the truth until version `since`, and reports the digest that was asked for."""

    since = 0  # the canary's adapter has version 0 too

    def lies(self, ref: AdapterRef | None) -> bool:
        return ref is not None and ref.version >= self.since

    async def load(self, ref: AdapterRef, state: AdapterState) -> str | None:
        await super().load(ref, self.changed(state) if self.lies(ref) else state)
        return ref.digest

    def changed(self, state: AdapterState) -> AdapterState:
        """What is installed instead."""
        return state

    def instead(self, ref: AdapterRef | None) -> AdapterRef | None:
        """What answers instead."""
        return ref

    async def score(
        self, sequences: Sequence[Ints], adapter: AdapterRef | None, temperature: float = 1.0
    ) -> list[Floats]:
        served = self.instead(adapter) if self.lies(adapter) else adapter
        return await super().score(sequences, served, temperature)

    async def generate(self, request: GenerateRequest) -> Completion:
        served = self.instead(request.adapter) if self.lies(request.adapter) else request.adapter
        return await super().generate(replace(request, adapter=served))


class Ignores(Liar):
    def instead(self, ref: AdapterRef | None) -> AdapterRef | None:
        return None


class ServesTheVersionBefore(Liar):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._before: dict[str, AdapterState] = {}

    async def load(self, ref: AdapterRef, state: AdapterState) -> str | None:
        if not self.lies(ref):
            self._before[ref.name] = state
        return await super().load(ref, self._before[ref.name])


class ServesAnothersRun(Liar):
    """Of the same shape and about the same size."""

    def changed(self, state: AdapterState) -> AdapterState:
        generator = torch.Generator().manual_seed(7)

        def shuffled(tensor: torch.Tensor) -> torch.Tensor:
            order = torch.randperm(tensor.numel(), generator=generator)
            return tensor.flatten()[order].reshape(tensor.shape)

        tensors = {name: shuffled(tensor) for name, tensor in state.tensors.items()}
        return AdapterState(spec=state.spec, tensors=tensors)


class HalvesAlpha(Liar):
    def changed(self, state: AdapterState) -> AdapterState:
        spec = replace(state.spec, alpha=state.spec.alpha / 2)
        return AdapterState(spec=spec, tensors=state.tensors)


class SwapsTwoModules(Liar):
    """gate_proj and up_proj of one layer, which have the same shape."""

    def changed(self, state: AdapterState) -> AdapterState:
        def other(name: str) -> str:
            if ".layers.1." not in name:
                return name
            if "gate_proj" in name:
                return name.replace("gate_proj", "up_proj")
            return name.replace("up_proj", "gate_proj")

        tensors = {name: state.tensors[other(name)] for name in state.tensors}
        return AdapterState(spec=state.spec, tensors=tensors)


class ReportsTemperatureOne(Liar):
    """Samples with the temperature, and reports log-probabilities without it, as vLLM may."""

    async def generate(self, request: GenerateRequest) -> Completion:
        answer = await super().generate(request)
        whole = torch.cat([torch.from_numpy(x) for x in (request.tokens, answer.tokens)]).numpy()
        (plain,) = await self.score([whole], request.adapter)
        return replace(answer, logprobs=plain[len(request.tokens) - 1 :])


class DeafFromTheStart(Liar):
    """Digests and scores are right; generation ignores the adapter."""

    async def generate(self, request: GenerateRequest) -> Completion:
        return await super().generate(replace(request, adapter=None))


LIES = (Ignores, ServesTheVersionBefore, ServesAnothersRun, HalvesAlpha, SwapsTwoModules)


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    return make_workplace(tmp_path_factory.mktemp("place"), tiny_tokenizer)


@asynccontextmanager
async def loop_of(
    folder: Path, place: Path, kind: type[EmbeddedEngine] = EmbeddedEngine, **sections: Any
) -> AsyncIterator[Loop]:
    """The loop of a new run, or of one that goes on, on that inference engine."""
    path = write_run(place, "run", **{"eval": {"every": 0}, **sections})
    running = load_config(path).rollout.max_running
    async with AsyncExitStack() as stack:

        def engine(parts: RunComponents) -> EmbeddedEngine:
            assert parts.decoder is not None
            made = kind(parts.decoder, max_running=running)
            stack.push_async_callback(made.close)
            return made

        yield await stack.enter_async_context(open_loop(path, folder, engine))


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_a_lie_about_a_version_is_caught_before_its_step_is_committed(
    tmp_path: Path, place: Path, lie: type[Liar]
) -> None:
    late = type("Late", (lie,), {"since": 2})

    async def body() -> None:
        async with loop_of(tmp_path / "whole", place) as loop:
            await whole(loop)
            expected = digest(loop)
        async with loop_of(tmp_path / "run", place, late) as loop:
            with pytest.raises(CanaryFailed, match=r"default@v2: .*docs/errors.md#the-canary") as e:
                await whole(loop)
            assert loop.store.latest is not None and loop.store.latest.step == 1
            served = (await loop.canary._engine.health()).adapters  # type: ignore[union-attr]
            assert [name.split("-")[:2] for name in served] == [["default", "v1"]]
        page = "\n".join(e.value.page)
        assert "asked for default@v2" in page and "Likely: " in page and "Do: " in page
        left = check_run(tmp_path / "run")
        assert all("the next resume removes it" in line for line in left), left
        assert [r["step"] for r in records(tmp_path / "run", "step")] == [1]
        async with loop_of(tmp_path / "run", place) as loop:
            assert versions(loop) == {"default": 1}
            await whole(loop)
            assert digest(loop) == expected, "as if nothing had been"

    asyncio.run(body())
    assert check_run(tmp_path / "run") == []


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        (Ignores, "answers as the base model"),
        (ServesTheVersionBefore, "answers as version 1"),
    ],
)
def test_the_page_names_whose_answer_it_was(
    tmp_path: Path, place: Path, lie: type[Liar], said: str
) -> None:
    late = type("Late", (lie,), {"since": 2})

    async def body() -> None:
        async with loop_of(tmp_path / "run", place, late) as loop:
            with pytest.raises(CanaryFailed, match=said):
                await whole(loop)

    asyncio.run(body())


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        (Ignores, "the adapter is ignored"),
        (ServesAnothersRun, "another adapter is served"),
        (HalvesAlpha, "the scale differs"),
        (SwapsTwoModules, "swapped"),
        (DeafFromTheStart, "generation ignores the adapter"),
        (ReportsTemperatureOne, "before the temperature"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_lie_from_the_start_is_caught_before_the_first_step(
    tmp_path: Path, place: Path, lie: type[Liar], said: str
) -> None:
    async def body() -> None:
        sampling = {"temperature": 0.5}
        async with loop_of(tmp_path / "run", place, lie, rollout=sampling) as loop:
            with pytest.raises(CanaryFailed, match="adapter default: ") as caught:
                await whole(loop)
            assert loop.store.latest is None
            assert said in "\n".join(caught.value.page)
            assert (await loop.canary._engine.health()).adapters == ()  # type: ignore[union-attr]

    asyncio.run(body())


def test_a_wrong_digest_stops_a_run_whose_scores_are_right(tmp_path: Path, place: Path) -> None:
    class Casts(EmbeddedEngine):
        async def load(self, ref: AdapterRef, state: AdapterState) -> str | None:
            told = await super().load(ref, state)
            return told if ref.version < 2 else "0" * 64

    async def body() -> None:
        async with loop_of(tmp_path / "run", place, Casts) as loop:
            with pytest.raises(CanaryFailed, match="default@v2: the rollout engine installed 0000"):
                await whole(loop)
            assert loop.store.latest is not None and loop.store.latest.step == 1

    asyncio.run(body())


def test_another_base_model_is_noticed(tmp_path: Path, place: Path) -> None:
    class AnotherBase(EmbeddedEngine):
        async def score(
            self, sequences: Sequence[Ints], adapter: AdapterRef | None, temperature: float = 1.0
        ) -> list[Floats]:
            return await super().score(sequences, adapter, 0.5)

    async def body() -> None:
        async with loop_of(tmp_path / "run", place, AnotherBase) as loop:
            with pytest.raises(CanaryFailed, match="do not hold the same base model"):
                await whole(loop)

    asyncio.run(body())


def test_an_engine_that_is_stuck_is_caught_when_small_steps_have_added_up(
    tmp_path: Path, place: Path
) -> None:
    """Versions that no score can tell apart are trusted; the first one that can be is not."""

    class Noisy(ServesTheVersionBefore):
        since = 1

        async def score(
            self, sequences: Sequence[Ints], adapter: AdapterRef | None, temperature: float = 1.0
        ) -> list[Floats]:
            rng = torch.Generator().manual_seed(len(sequences[0]) + (adapter is None))
            return [
                logprobs + 0.03 * torch.randn(len(logprobs), generator=rng).numpy()
                for logprobs in await super().score(sequences, adapter, temperature)
            ]

    async def body() -> None:
        small = {"algo": {"lr": 3e-4}, "steps": 40}
        async with loop_of(tmp_path / "run", place, Noisy, **small) as loop:
            with pytest.raises(CanaryFailed, match="answers as"):
                await whole(loop)
            assert loop.store.latest is not None and loop.store.latest.step >= 1

    asyncio.run(body())
    blind = [r["canary_told_apart"] for r in records(tmp_path / "run", "step")]
    assert 0.0 in blind


def test_an_honest_run_reports_its_distances(tmp_path: Path, place: Path) -> None:
    adapters = {
        "a": {},
        "b": {"lora": {"lora_rank": 2, "use_rslora": True, "target_modules": ["q_proj"]}},
        "c": {"rollout": {"temperature": 0.7}},
    }

    async def body() -> None:
        async with loop_of(tmp_path / "run", place, adapters=adapters) as loop:
            await whole(loop)

    asyncio.run(body())
    proofs = {r["adapter"]: r for r in records(tmp_path / "run", "canary")}
    assert sorted(proofs) == ["a", "b"], "a and c have the same shape"
    for proof in proofs.values():
        assert proof["signal"] > 0.5
        assert max(proof["distance"], proof["sampled"]) < 1e-4 < proof["signal"]
    for step in records(tmp_path / "run", "step"):
        assert step["canary_version"] < 1e-5
        assert step["canary_before"] > 10 * step["canary_version"]
        assert step["canary_base"] > 10 * step["canary_version"]
        assert step["canary_told_apart"] == 1.0
        assert 0 < step["canary_seconds"] < step["seconds"]["step"]


def test_full_fine_tuning_is_watched_too(tmp_path: Path, place: Path) -> None:
    class Stuck(ServesTheVersionBefore):
        since = 2

    full = {"lora": {"use_lora": False}, "algo": {"lr": 1e-3}}

    async def body() -> None:
        async with loop_of(tmp_path / "run", place, Stuck, **full) as loop:
            with pytest.raises(CanaryFailed, match=r"default@v2: .*answers as version 1"):
                await whole(loop)
            assert loop.store.latest is not None and loop.store.latest.step == 1
        async with loop_of(tmp_path / "run", place, **full) as loop:
            await whole(loop)

    asyncio.run(body())


def test_a_canary_that_is_off_checks_nothing_and_is_warned_of(tmp_path: Path, place: Path) -> None:
    off = {"publish": {"canary": {"enabled": False}}}

    async def body() -> None:
        async with loop_of(tmp_path / "run", place, HalvesAlpha, **off) as loop:
            assert loop.canary is None
            await whole(loop)

    asyncio.run(body())
    assert records(tmp_path / "run", "canary") == []
    warnings = load_config(write_run(place, "off", **off)).warnings()
    assert [w for w in warnings if w.startswith("publish.canary.enabled: false; nobody notices")]


def test_a_random_adapter_is_the_same_in_bfloat16_and_new_at_every_start(place: Path) -> None:
    async def body() -> None:
        async with loop_of(place / "shape", place) as loop:
            fresh = loop.engine.adapter_state("default")
            one, same, other = (random_adapter(fresh, 1.0, n) for n in ("x", "x", "y"))
            assert one.digest() == same.digest() != other.digest()
            for tensor in one.tensors.values():
                assert tensor.count_nonzero() > 0
                assert torch.equal(tensor.bfloat16().float(), tensor)

    asyncio.run(body())
