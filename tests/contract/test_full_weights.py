"""Full fine-tuning through the contracts: train engines, the publisher, the embedded engine."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor

from lorelei.inference.embedded.engine import EmbeddedEngine
from lorelei.lora.state import AdapterState
from lorelei.publish.contract import PublishError
from lorelei.publish.publisher import VersionPublisher
from lorelei.train.archon.engine import archon_engine
from lorelei.train.contract import TrainEngine
from lorelei.types import (
    BASE,
    FULL_WEIGHTS,
    AdamHyper,
    AdapterRef,
    AdapterSpec,
    Batch,
    Completion,
    GenerateRequest,
    Rollout,
    SamplingParams,
)
from tests.contract.oracle import grpo_loss
from tests.contract.reference_rollout import reference_logprobs
from tests.contract.train_engines import GRPO, assert_close, assert_equal, make_engine
from tests.decoders import load_decoder
from tests.episodes import random_group, weighted_batch
from tests.parity.oracle import hf_model
from tests.parity.test_full_parity import unstacked
from tests.tiny_models import make_tiny

FP32 = 1e-5  # two orders of summation in fp32 differ by about 1e-6
HYPER = AdamHyper(lr=1e-2)
LORA = AdapterSpec(rank=2, alpha=4)
T = TypeVar("T")


@pytest.fixture(scope="module", params=["llama", "qwen3_moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tied = request.param == "llama"
    return make_tiny(request.param, tmp_path_factory.mktemp("model"), tie_word_embeddings=tied)


RANKS = ("archon-two-ranks", "fsdp-dp2", "fsdp-sp2")


@pytest.fixture(
    scope="module",
    params=("archon", *(pytest.param(kind, marks=pytest.mark.slow) for kind in RANKS)),
)
def engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[TrainEngine]:
    made = make_engine(request.param, folder)
    yield made
    made.close()


@pytest.fixture
def full(engine: TrainEngine) -> Iterator[TrainEngine]:
    engine.add_adapter("a", FULL_WEIGHTS)
    yield engine
    engine.drop_adapter("a")


def some_groups(seed: int) -> list[tuple[Rollout, ...]]:
    """Two groups, one of more tokens than a small micro-batch."""
    rng = np.random.default_rng(seed)
    return [random_group(rng, 9, [7, 1, 12, 1]), random_group(rng, 3, [4, 5])]


def some_batch(seed: int) -> Batch:
    return weighted_batch("a", some_groups(seed))


def train(engine: TrainEngine, steps: range) -> None:
    for step in steps:
        engine.forward_backward(some_batch(step), {"a": GRPO})
        engine.optim_step({"a": HYPER})


class FullOracle:
    """Every weight of transformers' model, trainable by torch."""

    def __init__(self, folder: Path) -> None:
        self.model = hf_model(folder, torch.float32).requires_grad_(True)
        self.parameters: Mapping[str, Tensor] = dict(self.model.named_parameters())

    def logits(self, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        return self.model(input_ids=tokens_BT, attention_mask=mask_BT, use_cache=False).logits


def test_three_steps_are_those_of_torchs_adamw_on_transformers(
    full: TrainEngine, folder: Path
) -> None:
    # eps near the size of the gradients, see the same test of adapters
    hyper = AdamHyper(lr=1e-3, eps=1e-3, weight_decay=0.1, max_grad_norm=0.5)
    oracle = FullOracle(folder)
    held = list(oracle.parameters.values())
    start = {n: t.detach().clone() for n, t in unstacked(oracle.parameters)}
    adam = torch.optim.AdamW(held, lr=1e-3, eps=1e-3, weight_decay=0.1)
    assert_equal(full.adapter_state("a").tensors, start)
    for step in range(3):
        groups = some_groups(step)
        outputs = full.forward_backward(weighted_batch("a", groups), {"a": GRPO})
        stats = full.optim_step({"a": hyper})["a"]
        adam.zero_grad(set_to_none=False)
        loss = grpo_loss(oracle, [r for group in groups for r in group])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(held, 0.5).item()
        adam.step()
        assert outputs.loss["a"] == pytest.approx(loss.item(), rel=FP32)
        assert stats.grad_norm == pytest.approx(norm, rel=FP32) and norm > 0.5
    got = full.adapter_state("a").tensors
    expected = {n: t.detach() for n, t in unstacked(oracle.parameters)}
    assert_close(got, expected, FP32)
    # the distance travelled, not only the place
    moved = {n: got[n] - t for n, t in start.items()}
    assert_close(moved, {n: expected[n] - t for n, t in start.items()}, 1e-4)


def test_a_restored_snapshot_goes_on_bit_for_bit(full: TrainEngine) -> None:
    train(full, range(2))
    middle = full.snapshot("a")
    train(full, range(2, 4))
    end = full.snapshot("a")
    full.drop_adapter("a")
    full.add_adapter("a", FULL_WEIGHTS)
    full.restore("a", middle)
    train(full, range(2, 4))
    redone = full.snapshot("a")
    assert redone.step == end.step == 4
    for one, other in (
        (redone.state.tensors, end.state.tensors),
        (redone.exp_avg, end.exp_avg),
        (redone.exp_avg_sq, end.exp_avg_sq),
    ):
        assert_equal(one, other)


def test_a_policy_is_the_base_or_the_weights_that_are_held(full: TrainEngine) -> None:
    batch = some_batch(1)
    base = full.logprobs(batch, "current").logprobs
    train(full, range(1))
    given = full.adapter_state("a")
    current = full.logprobs(batch, "current").logprobs
    assert np.abs(current - base).max() > 1e-2, "weights that do not move would pass"
    np.testing.assert_allclose(full.logprobs(batch, BASE).logprobs, base, rtol=FP32)
    full.hold("earlier", given)
    train(full, range(1, 2))
    np.testing.assert_array_equal(full.logprobs(batch, "earlier").logprobs, current)
    assert np.abs(full.logprobs(batch, "current").logprobs - current).max() > 1e-2


def test_nothing_trains_beside_full_weights(full: TrainEngine) -> None:
    for spec in (LORA, FULL_WEIGHTS):
        with pytest.raises(ValueError, match="adapter 'b': full fine-tuning trains one model"):
            full.add_adapter("b", spec)
    full.drop_adapter("a")
    full.add_adapter("b", LORA)
    with pytest.raises(ValueError, match=r"adapter 'a': full fine-tuning .* 'b' is there"):
        full.add_adapter("a", FULL_WEIGHTS)
    lora = full.snapshot("b")
    full.drop_adapter("b")
    full.add_adapter("a", FULL_WEIGHTS)
    before = full.adapter_state("a").digest()
    with pytest.raises(ValueError, match=r"snapshot is of lora.use_lora: true, .* start a new one"):
        full.restore("a", lora)
    assert full.adapter_state("a").digest() == before


def test_a_snapshot_is_a_copy_and_a_misshapen_one_is_refused(full: TrainEngine) -> None:
    snapshot = full.snapshot("a")
    digest = snapshot.state.digest()
    train(full, range(1))
    assert snapshot.state.digest() == digest != full.adapter_state("a").digest()
    tensors = {**snapshot.state.tensors, "model.norm.weight": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"model.norm.weight has shape \(3,\)"):
        full.restore("a", replace(snapshot, state=AdapterState(spec=FULL_WEIGHTS, tensors=tensors)))


# --- published


@pytest.fixture
def trainer(folder: Path) -> TrainEngine:
    engine = archon_engine(load_decoder(folder))
    engine.add_adapter("a", FULL_WEIGHTS)
    train(engine, range(1))
    return engine


def run(body: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(body, 60))


def ask(ref: AdapterRef | None, key: str, tokens: int = 12) -> GenerateRequest:
    return GenerateRequest(
        tokens=np.arange(5, 25, dtype=np.int32),
        adapter=ref,
        sampling=SamplingParams(max_new_tokens=tokens),
        key=key,
    )


def bits(answer: Completion) -> tuple[bytes, bytes]:
    return answer.tokens.tobytes(), answer.logprobs.tobytes()


def test_versions_and_the_base_are_served_side_by_side_as_each_alone(
    folder: Path, trainer: TrainEngine
) -> None:
    async def body() -> None:
        engine = EmbeddedEngine(load_decoder(folder), max_running=4)
        publisher = VersionPublisher(engine, "r")
        one = (await publisher.publish({"a": 1}, {"a": trainer.adapter_state("a")}))["a"]
        train(trainer, range(1, 3))
        two = (await publisher.publish({"a": 2}, {"a": trainer.adapter_state("a")}))["a"]
        asked = [ask(ref, str(i)) for i in range(3) for ref in (one, two, None)]
        alone = {}
        for ref in (one, two, None):  # those of one version at once
            mine = [r for r in asked if r.adapter == ref]
            answers = await asyncio.gather(*map(engine.generate, mine))
            alone |= {(r.key, ref): bits(a) for r, a in zip(mine, answers, strict=True)}
        mixed = await asyncio.gather(*map(engine.generate, asked))
        assert len({tokens for tokens, _ in alone.values()}) == 9
        for request, answer in zip(asked, mixed, strict=True):
            tokens, logprobs = alone[request.key, request.adapter]
            assert answer.tokens.tobytes() == tokens
            np.testing.assert_allclose(
                answer.logprobs, np.frombuffer(logprobs, np.float32), atol=1e-5
            )
        await publisher.retire(one)
        assert (await engine.health()).adapters == (two.served_name,)
        assert engine._published._models.keys() == {two.served_name}
        await engine.close()

    run(body())


def test_what_is_served_is_what_was_published_whatever_the_trainer_does_next(
    folder: Path, trainer: TrainEngine
) -> None:
    rollouts = some_groups(7)[0]
    tokens = [np.concatenate([r.turns[0].prompt, r.turns[0].completion.tokens]) for r in rollouts]
    batch = weighted_batch("a", [rollouts])
    published = trainer.logprobs(batch, "current").logprobs

    async def body() -> list[np.ndarray]:
        engine = EmbeddedEngine(trainer._bank.decoder)  # one process, one base model
        states = {"a": trainer.adapter_state("a")}
        ref = (await VersionPublisher(engine, "r").publish({"a": 1}, states))["a"]
        train(trainer, range(1, 3))
        scores = await engine.score(tokens, ref)
        base = await engine.score(tokens, None)
        await engine.close()
        model = hf_model(folder, torch.float32)
        for sequence, got in zip(tokens, base, strict=True):
            np.testing.assert_allclose(got, reference_logprobs(model, sequence, 1.0), atol=1e-4)
        return scores

    prompt = len(rollouts[0].turns[0].prompt)
    served = np.concatenate([score[prompt - 1 :] for score in run(body())])
    np.testing.assert_allclose(served, published, atol=1e-5)
    assert np.abs(trainer.logprobs(batch, "current").logprobs - published).max() > 1e-2


def test_weights_that_do_not_fit_are_refused_and_change_nothing(
    folder: Path, trainer: TrainEngine
) -> None:
    state = trainer.adapter_state("a")
    norm = "model.norm.weight"
    lacking = {n: t for n, t in state.tensors.items() if n != norm}
    wrong = {
        "no tensor 'model.norm.weight'": lacking,
        "has shape": {**lacking, norm: torch.zeros(3)},
        "not finite": {**lacking, norm: torch.full_like(state.tensors[norm], torch.nan)},
        "belongs to no layer": {**state.tensors, "model.more.weight": torch.zeros(3)},
        "dtype: float32": {**lacking, norm: state.tensors[norm].double()},
    }

    async def body() -> None:
        engine = EmbeddedEngine(load_decoder(folder))
        for number, (words, tensors) in enumerate(wrong.items()):
            ref = AdapterRef(name="a", version=number, run_id="r", digest="0" * 12)
            with pytest.raises(ValueError, match=words):
                await engine.load(ref, AdapterState(spec=state.spec, tensors=tensors))
            assert (await engine.health()).adapters == ()
        await engine.close()

    run(body())


def test_a_sampler_in_bf16_refuses_fp32_weights(folder: Path, trainer: TrainEngine) -> None:
    async def body() -> None:
        engine = EmbeddedEngine(load_decoder(folder, torch.bfloat16))
        with pytest.raises(PublishError, match=r"need a run with dtype: float32"):
            await VersionPublisher(engine, "r").publish({"a": 1}, {"a": trainer.adapter_state("a")})
        await engine.close()

    run(body())


def test_a_published_version_sent_again_is_the_same_one(folder: Path, trainer: TrainEngine) -> None:
    state = trainer.adapter_state("a")
    ref = AdapterRef(name="a", version=1, run_id="r", digest=state.digest())

    async def body() -> tuple[str | None, str | None]:
        engine = EmbeddedEngine(load_decoder(folder))
        answers = await engine.load(ref, state), await engine.load(ref, state)
        await engine.close()
        return answers

    assert run(body()) == (ref.digest, ref.digest)
