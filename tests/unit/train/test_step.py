"""One pass of works on a tiny model: what it updates, and what it says of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from lorelei.algo import clip, rloo
from lorelei.algo.loss import loss_path
from lorelei.model.decoder import Decoder
from lorelei.model.load import load_decoder
from lorelei.train.archon.engine import archon_engine
from lorelei.train.contract import TrainEngine
from lorelei.train.step import run_works
from lorelei.train.work import Round, Work
from lorelei.types import BASE, CURRENT, AdamHyper, AdapterSpec, Batch, Floats, Items, LossSpec
from tests.episodes import random_group, weighted_batch
from tests.tiny_models import make_tiny

SPEC = AdapterSpec(rank=4, alpha=8, target_modules=("q_proj", "down_proj"))
HYPER = AdamHyper(lr=1e-2, eps=1e-3)  # a large eps: adam's sign hides no difference
STREAMS = ("advantage", "behaviour")
# a narrow clip: it bites as soon as the first round has moved the policy
CLIPPED = LossSpec(
    path=loss_path(clip.loss), params={"eps_clip": 1e-3, "kl_ctl": 0.2}, streams=STREAMS
)
REINFORCE = LossSpec(path=loss_path(rloo.loss), params={"kl_ctl": 0.1}, streams=STREAMS)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return load_decoder(make_tiny("llama", tmp_path_factory.mktemp("llama")))


@pytest.fixture
def engine(decoder: Decoder) -> Iterator[TrainEngine]:
    made = archon_engine(decoder)
    for seed, name in enumerate("abc"):
        made.add_adapter(name, SPEC, seed)
    yield made
    made.close()


def alone(decoder: Decoder, name: str, seed: int = 0) -> TrainEngine:
    made = archon_engine(decoder)
    made.add_adapter(name, SPEC, seed)
    return made


def batches(adapter: str, seed: int = 0) -> list[Batch]:
    rng = np.random.default_rng(seed)
    return [
        weighted_batch(adapter, [random_group(rng, 6, [4, 1, 5], adapter)]),
        weighted_batch(adapter, [random_group(rng, 3, [2, 6], adapter)]),
    ]


def work(adapter: str, found: Sequence[Batch], loss: LossSpec = CLIPPED) -> Work:
    """A step on each batch, with what these losses may compare with."""
    rounds = tuple(Round(batch=batch, loss=loss, step=HYPER) for batch in found)
    return Work(adapter=adapter, rounds=rounds, policies={"proximal": CURRENT, "reference": BASE})


def digest(engine: TrainEngine, name: str = "a") -> str:
    return engine.adapter_state(name).digest()


def test_a_round_is_one_forward_backward_and_one_optimizer_step(
    engine: TrainEngine, decoder: Decoder
) -> None:
    (batch, _) = batches("a")
    (result,) = run_works(
        engine, [Work(adapter="a", rounds=(Round(batch=batch, loss=CLIPPED, step=HYPER),))]
    )
    by_hand = alone(decoder, "a")
    outputs = by_hand.forward_backward(batch, {"a": CLIPPED})
    taken = by_hand.optim_step({"a": HYPER})
    assert digest(engine) == digest(by_hand)
    (only,) = result.rounds
    assert only.step == taken["a"]
    assert only.metrics == outputs.metrics["a"] and only.metrics["loss"] == outputs.loss["a"]
    np.testing.assert_array_equal(only.outputs.logprobs, outputs.items.logprobs)
    np.testing.assert_array_equal(only.outputs.entropy, outputs.items.entropy)
    assert result.adapter == "a" and result.seconds > 0


def test_rounds_step_in_turn_against_the_policies_of_the_start(
    engine: TrainEngine, decoder: Decoder
) -> None:
    found = batches("a")
    (result,) = run_works(engine, [work("a", found)])
    by_hand = alone(decoder, "a")
    filled: list[Batch] = []
    for batch in found:
        start = by_hand.logprobs(batch, CURRENT).logprobs
        base = by_hand.logprobs(batch, BASE).logprobs
        streams = {**batch.items.streams, "proximal": start, "reference": base}
        filled.append(replace(batch, items=replace(batch.items, streams=streams)))
    for batch in filled:
        outputs = by_hand.forward_backward(batch, {"a": CLIPPED})
        by_hand.optim_step({"a": HYPER})
    last = result.rounds[-1]
    assert last.step is not None and last.step.step == 2
    assert last.metrics["clipped"] == outputs.metrics["a"]["clipped"] > 0
    assert last.metrics["kl_reference"] == outputs.metrics["a"]["kl_reference"] > 0
    assert digest(engine) == digest(by_hand)


def test_advantages_may_follow_from_the_policies_of_all_rounds(
    engine: TrainEngine, decoder: Decoder
) -> None:
    found = batches("a")

    def less_divergence(rounds: Sequence[Items]) -> list[Floats]:
        """Centred over both rounds, so that each needs the other."""
        own = [items.streams["reference"] - items.streams["behaviour"] for items in rounds]
        return [values - np.concatenate(own).mean() for values in own]

    asked = replace(work("a", found), advantages=less_divergence)
    run_works(engine, [asked])
    by_hand = alone(decoder, "a")
    filled: list[Batch] = []
    for batch in found:
        policies = {
            "proximal": by_hand.logprobs(batch, CURRENT).logprobs,
            "reference": by_hand.logprobs(batch, BASE).logprobs,
        }
        streams = {**batch.items.streams, **policies}
        filled.append(replace(batch, items=replace(batch.items, streams=streams)))
    advantages = less_divergence([batch.items for batch in filled])
    for batch, values in zip(filled, advantages, strict=True):
        streams = {**batch.items.streams, "advantage": values}
        one = replace(batch, items=replace(batch.items, streams=streams))
        by_hand.forward_backward(one, {"a": CLIPPED})
        by_hand.optim_step({"a": HYPER})
    assert digest(engine) == digest(by_hand)


def test_the_gradients_of_a_round_without_a_step_wait_for_the_next_one(
    engine: TrainEngine, decoder: Decoder
) -> None:
    first, second = batches("a")
    waits = Round(batch=first, loss=REINFORCE, step=None)
    steps = Round(batch=second, loss=REINFORCE, step=HYPER)
    before = digest(engine)
    (result,) = run_works(engine, [Work(adapter="a", rounds=(waits,), publish=False)])
    assert result.rounds[0].step is None and result.work.steps == 0
    assert digest(engine) == before
    # another adapter that steps meanwhile does not touch them
    run_works(engine, [work("b", batches("b", 1))])
    run_works(engine, [Work(adapter="a", rounds=(steps,))])
    by_hand = alone(decoder, "a")
    for batch in (first, second):
        by_hand.forward_backward(batch, {"a": REINFORCE})
    by_hand.optim_step({"a": HYPER})
    assert digest(engine) == digest(by_hand)


def test_adapters_of_different_losses_and_rounds_step_together_as_alone(
    engine: TrainEngine, decoder: Decoder
) -> None:
    one = weighted_batch("b", [random_group(np.random.default_rng(1), 5, [3, 4], "b")])
    works = [work("a", batches("a")), work("b", [one], REINFORCE)]
    resting = engine.snapshot("c").state.digest()
    results = run_works(engine, works)
    assert [result.adapter for result in results] == ["a", "b"]
    assert [len(result.rounds) for result in results] == [2, 1]
    assert engine.snapshot("c").state.digest() == resting
    for seed, (name, mine, result) in enumerate(zip("ab", works, results, strict=True)):
        single = alone(decoder, name, seed)
        (expected,) = run_works(single, [mine])
        for got, right in zip(result.rounds, expected.rounds, strict=True):
            assert got.step is not None and right.step is not None
            assert got.step.grad_norm == pytest.approx(right.step.grad_norm, rel=1e-4)
            assert got.metrics == pytest.approx(right.metrics, rel=1e-4, abs=1e-6)
            np.testing.assert_allclose(got.outputs.logprobs, right.outputs.logprobs, atol=1e-4)
        states = single.adapter_state(name).tensors, engine.adapter_state(name).tensors
        for tensor_name, tensor in states[0].items():
            torch.testing.assert_close(states[1][tensor_name], tensor, atol=1e-5, rtol=0)


@pytest.mark.parametrize("loss", ["refuses", "infinite"])
def test_what_cannot_be_trained_on_costs_no_other_adapter_anything(
    engine: TrainEngine, decoder: Decoder, loss: str
) -> None:
    bad = LossSpec(path=f"tests.contract.losses:{loss}", params={})
    before = digest(engine, "a")
    waits, steps = (
        Round(batch=batch, loss=CLIPPED, step=step)
        for batch, step in zip(batches("b"), (None, HYPER), strict=True)
    )
    (first, second) = batches("a")
    fails = Work(
        adapter="a",
        rounds=(
            Round(batch=first, loss=CLIPPED, step=None),
            Round(batch=second, loss=bad, step=HYPER),
        ),
    )
    good = Work(adapter="b", rounds=(waits, steps))
    failed, trained = run_works(engine, [fails, good])
    assert failed.error is not None and "adapter 'a'" in str(failed.error)
    assert trained.error is None and len(trained.rounds) == 2
    assert digest(engine, "a") == before
    single = alone(decoder, "b", 1)
    (expected,) = run_works(single, [good])
    for got, right in zip(trained.rounds, expected.rounds, strict=True):
        np.testing.assert_allclose(got.outputs.logprobs, right.outputs.logprobs, atol=1e-5)
    for name, tensor in single.adapter_state("b").tensors.items():
        torch.testing.assert_close(
            engine.adapter_state("b").tensors[name], tensor, atol=1e-5, rtol=0
        )
    with pytest.raises(ValueError, match="there are no gradients"):
        engine.optim_step({"a": HYPER})


def test_what_fails_between_its_own_steps_is_raised(engine: TrainEngine) -> None:
    (first, second) = work("a", batches("a")).rounds
    bad = LossSpec(path="tests.contract.losses:refuses", params={})
    with pytest.raises(ValueError, match="this one refuses"):
        run_works(engine, [Work(adapter="a", rounds=(first, replace(second, loss=bad)))])
