"""Preference losses in train engines: against transformers and peft, and in any cut of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lorelei.algo.kinds import algorithm
from lorelei.train.archon.engine import archon_engine
from lorelei.train.batch import comparison_batch, concatenate
from lorelei.train.contract import TrainEngine
from lorelei.train.layout import flatten, pieces
from lorelei.train.step import run_works
from lorelei.train.work import Round, Work
from lorelei.types import BASE, AdamHyper, AdapterSpec, Batch, Comparison
from tests.contract.train_engines import (
    GRPO,
    SMALL,
    adapters,
    assert_close,
    gradients,
    look,
    make_engine,
    randomise,
)
from tests.decoders import load_decoder
from tests.episodes import VOCAB, random_group, weighted_batch
from tests.parity.oracle import gradients as peft_gradients
from tests.parity.oracle import hf_logits, peft_model
from tests.tiny_models import make_tiny

SPEC = AdapterSpec(rank=4, alpha=8)
FP32 = 1e-5  # two orders of summation in fp32
KINDS = ("dpo", "ipo", "kto", "orpo", "simpo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("model"))


def compared(count: int = 5, paired: bool = True) -> list[Comparison]:
    """Prompts and answers of many lengths; some pairs are longer than a micro-batch."""
    rng = np.random.default_rng(0)

    def tokens(most: int) -> np.ndarray:
        return rng.integers(3, VOCAB, rng.integers(1, most)).astype(np.int32)

    return [
        Comparison(
            id=str(n),
            prompt=tokens(14),
            answers=(tokens(12), tokens(12)) if paired else (tokens(12),),
            signs=(1, -1) if paired else (1 if n % 2 else -1,),
        )
        for n in range(count)
    ]


def read(kind: str, engine: TrainEngine, name: str = "a") -> tuple[Batch, Any]:
    """(the batch of a kind with its streams, the loss)."""
    algo = algorithm({"kind": kind})
    batch = comparison_batch(name, compared(paired=kind != "kto"))
    streams = dict(batch.items.streams)
    if "reference" in algo.policies:
        streams["reference"] = engine.logprobs(batch, BASE).logprobs
    if kind == "kto":
        streams["kl"] = np.full(len(batch.items), 0.3, np.float32)
    return replace(batch, items=replace(batch.items, streams=streams)), algo.loss()


def test_gradients_of_dpo_are_those_of_transformers_and_peft(folder: Path) -> None:
    engine = archon_engine(load_decoder(folder))
    with adapters(engine, a=SPEC):
        model = peft_model(folder, torch.float32, SPEC, engine.adapter_state("a").tensors)

        def logprob(one: Comparison, answer: np.ndarray) -> Tensor:
            whole = np.concatenate([one.prompt, answer]).tolist()
            found = hf_logits(model, whole)[len(one.prompt) - 1 : -1].log_softmax(-1)
            return found.gather(-1, torch.from_numpy(answer.astype(np.int64))[:, None]).sum()

        losses: list[Tensor] = []
        for one in compared():
            with torch.no_grad(), model.disable_adapter():
                before = [logprob(one, answer) for answer in one.answers]
            chosen, rejected = (
                logprob(one, answer) - base
                for answer, base in zip(one.answers, before, strict=True)
            )
            losses.append(-torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)))
        total = torch.stack(losses).mean()
        total.backward()
        batch, loss = read("dpo", engine)
        got = engine.forward_backward(batch, {"a": loss})
        found = gradients_held(engine)
    assert got.loss["a"] == pytest.approx(total.item(), rel=FP32)
    assert_close(found, peft_gradients(model), FP32)


def gradients_held(engine: TrainEngine) -> Mapping[str, Tensor]:
    return look(engine, "a")["a"]


def assert_the_same(engine: TrainEngine, plain: TrainEngine, kind: str) -> None:
    """Loss, metrics and gradients of two engines."""
    with adapters(engine, a=SPEC), adapters(plain, a=SPEC):
        batch, loss = read(kind, plain)
        got, expected = (e.forward_backward(batch, {"a": loss}) for e in (engine, plain))
        # rewards are small differences of sums that are about 60
        assert got.metrics["a"] == pytest.approx(dict(expected.metrics["a"]), rel=FP32, abs=FP32)
        assert_close(gradients_held(engine), gradients_held(plain), FP32)


@pytest.mark.parametrize("max_tokens", [1, SMALL])
@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_change_nothing(folder: Path, kind: str, max_tokens: int) -> None:
    plain = archon_engine(load_decoder(folder))
    batch = comparison_batch("a", compared(paired=kind != "kto"))
    assert len(pieces(batch, max_tokens)) == 5  # no comparison is parted, however small they are
    assert_the_same(archon_engine(load_decoder(folder), max_tokens), plain, kind)


def test_answers_share_their_prompt(folder: Path) -> None:
    batch = comparison_batch("a", compared())
    apart = flatten(batch)
    # an answer of one token is predicted from the prompt alone
    twice = [one for one in compared() if min(map(len, one.answers)) > 1]
    prompts = sum(len(one.prompt) for one in twice)
    assert prompts
    read_together, read_apart = (sum(len(s.tokens) for s in b.segments) for b in (batch, apart))
    assert read_apart - read_together == prompts
    engine = archon_engine(load_decoder(folder))
    with adapters(engine, a=SPEC):
        batch, loss = read("dpo", engine)
        together, alone = (gradients(engine, b, {"a": loss})["a"] for b in (batch, flatten(batch)))
    assert_close(alone, together, FP32)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["archon-two-ranks", "fsdp-dp2"])
def test_data_parallel_ranks_change_nothing(folder: Path, engine: str) -> None:
    ranks, plain = make_engine(engine, folder), archon_engine(load_decoder(folder))
    try:
        for kind in KINDS:
            assert_the_same(ranks, plain, kind)
    finally:
        ranks.close()


def test_a_batch_in_parts_has_the_gradient_of_the_whole(folder: Path) -> None:
    """As a client may give it, in rounds that do not step."""
    engine = archon_engine(load_decoder(folder))
    with adapters(engine, a=SPEC):
        batch, loss = read("dpo", engine)
        whole = gradients(engine, batch, {"a": loss})["a"]
        for part in pieces(batch, 1):
            engine.forward_backward(part.batch, {"a": loss})
        assert_close(gradients_held(engine), whole, FP32)


def test_jobs_of_three_kinds_in_one_mixed_step_are_as_alone(folder: Path) -> None:
    rng = np.random.default_rng(0)
    rollouts = weighted_batch("c", [random_group(rng, 5, [3, 1, 6], "c")])
    step = AdamHyper(lr=1e-2)

    def work(kind: str, name: str) -> Work:
        algo = algorithm({"kind": kind})
        one = Round(batch=comparison_batch(name, compared()), loss=algo.loss(), step=step)
        return Work(adapter=name, rounds=(one,), policies=algo.policies)

    works = [
        work("dpo", "a"),
        work("orpo", "b"),
        Work(adapter="c", rounds=(Round(batch=rollouts, loss=GRPO, step=step),)),
    ]

    def trained(own: Sequence[Work]) -> dict[str, dict[str, Tensor]]:
        engine = archon_engine(load_decoder(folder), max_tokens_per_mb=40)
        for seed, one in enumerate(works):
            engine.add_adapter(one.adapter, SPEC)
            randomise(engine, one.adapter, seed)
        for _ in range(3):
            run_works(engine, own)
        return {one.adapter: dict(engine.adapter_state(one.adapter).tensors) for one in own}

    together = trained(works)
    for one in works:
        assert_close(together[one.adapter], trained([one])[one.adapter], FP32)


def test_sequences_of_adapters_stay_apart() -> None:
    both = concatenate([comparison_batch(name, compared()) for name in "ab"])
    assert len(np.unique(both.items.sequence)) == 10
