"""What every TrainEngine must do, whatever it is made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lorelei.lora.state import AdapterSnapshot, AdapterState
from lorelei.train.archon.engine import archon_engine
from lorelei.train.batch import concatenate
from lorelei.train.contract import TrainEngine
from lorelei.train.layout import flatten, pieces
from lorelei.types import BASE, CURRENT, AdamHyper, AdapterSpec, Batch, LossSpec, Rollout
from tests.contract.oracle import BaseOracle, grpo_loss, make_oracle, turn_logprobs
from tests.contract.train_engines import (
    DECOUPLED,
    ENGINES,
    GRPO,
    SMALL,
    adapters,
    assert_a_stream_arrives,
    assert_close,
    assert_equal,
    gradients,
    look,
    make_engine,
    randomise,
)
from tests.decoders import load_decoder
from tests.episodes import random_group, rollout, turn, weighted_batch
from tests.tiny_models import make_tiny

FP32 = 1e-5  # two orders of summation in fp32 differ by about 1e-6
FAMILIES = ("llama", "qwen3_moe")
SPEC = AdapterSpec(rank=4, alpha=8)
OTHER = AdapterSpec(rank=2, alpha=6, target_modules=("q_proj", "v_proj"))
HEAD = AdapterSpec(rank=2, alpha=4, target_modules=("o_proj", "lm_head"))
HYPER = AdamHyper(lr=1e-2)
LIKELIHOOD = LossSpec(path="tests.contract.losses:likelihood", params={"factor": 0.5})
REFUSES = LossSpec(path="tests.contract.losses:refuses", params={})
INFINITE = LossSpec(path="tests.contract.losses:infinite", params={})


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(family, tmp_path_factory.mktemp(family))


@pytest.fixture(scope="module")
def plain(folder: Path) -> TrainEngine:
    """One process, one micro-batch, no recomputation."""
    return archon_engine(load_decoder(folder), max_tokens_per_mb=10_000)


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[TrainEngine]:
    made = make_engine(request.param, folder)
    yield made
    made.close()


def some_groups(seed: int, adapter: str = "a") -> list[tuple[Rollout, ...]]:
    """Two groups: one of more tokens than a small micro-batch, with completions of one token."""
    rng = np.random.default_rng(seed)
    return [
        random_group(rng, 9, [7, 1, 12, 1], adapter),
        random_group(rng, 3, [4, 5], adapter),
    ]


def some_batch(seed: int, adapter: str = "a", temperature: float = 1.0) -> Batch:
    return weighted_batch(adapter, some_groups(seed, adapter), temperature)


def flat(groups: list[tuple[Rollout, ...]]) -> list[Rollout]:
    return [r for group in groups for r in group]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_loss_outputs_and_gradients_are_those_of_grpo_on_padded_sequences(
    engine: TrainEngine, family: str, folder: Path, temperature: float
) -> None:
    groups = some_groups(1)
    with adapters(engine, a=SPEC):
        tensors = engine.adapter_state("a").tensors
        oracle = make_oracle(family, folder, torch.float32, SPEC, tensors)
        expected = grpo_loss(oracle, flat(groups), temperature=temperature)
        expected.backward()
        batch = weighted_batch("a", groups, temperature)
        outputs = engine.forward_backward(batch, {"a": GRPO})
        got = look(engine, "a")["a"]
        again = engine.logprobs(batch, "current")
    assert outputs.loss["a"] == pytest.approx(expected.item(), rel=FP32)
    turns = [t for r in flat(groups) for t in r.turns]
    pairs = turn_logprobs(oracle, turns, temperature)
    logprobs, entropies = (torch.cat([pair[i] for pair in pairs]) for i in (0, 1))
    for items in (outputs.items, again):
        assert_close({"": torch.from_numpy(items.logprobs)}, {"": logprobs.detach()}, FP32)
        assert_close({"": torch.from_numpy(items.entropy)}, {"": entropies.detach()}, FP32)
    assert got.keys() == oracle.parameters.keys()
    reached = {n: p.grad for n, p in oracle.parameters.items() if p.grad is not None}
    assert_close({n: got[n] for n in reached}, reached, FP32)
    assert all(not got[n].any() for n in got.keys() - reached.keys())


def test_turns_have_the_gradients_of_plain_sequences_one_by_one(
    engine: TrainEngine, family: str, folder: Path
) -> None:
    """Turns that go on, a history that was rewritten, and two conversations side by side."""
    rng = np.random.default_rng(3)
    ask, new = rng.integers(0, 300, 5).tolist(), rng.integers(0, 300, 4).tolist()
    a, b, c = ([int(t) for t in rng.integers(0, 300, n)] for n in (3, 4, 2))
    group = (
        rollout(turn(ask, a), turn([*ask, *a, *new], b), turn([*ask, *a, *new, *b, 7], c)),
        rollout(turn(ask, b), turn([*ask, *new], a), turn([*new, 9], c)),
        rollout(turn(ask, a), turn(new, b), turn([*ask, *a, 8], c), turn([*new, *b, 8], a)),
    )
    groups = [tuple(replace(r, reward=float(i) - 0.5) for i, r in enumerate(group))]
    batch = weighted_batch("a", groups)
    assert sum(len(s.tokens) for s in batch.segments) < sum(
        len(t.prompt) + len(t.completion.tokens) for r in group for t in r.turns
    )
    with adapters(engine, a=SPEC):
        tensors = engine.adapter_state("a").tensors
        oracle = make_oracle(family, folder, torch.float32, SPEC, tensors)
        expected = grpo_loss(oracle, flat(groups))  # every turn is a sequence of its own there
        expected.backward()
        outputs = engine.forward_backward(batch, {"a": GRPO})
        got = look(engine, "a")["a"]
    assert outputs.loss["a"] == pytest.approx(expected.item(), rel=FP32)
    reached = {n: p.grad for n, p in oracle.parameters.items() if p.grad is not None}
    assert_close({n: got[n] for n in reached}, reached, FP32)


def test_three_steps_are_those_of_torchs_adamw_on_the_oracle(
    engine: TrainEngine, family: str, folder: Path
) -> None:
    # eps near the size of the gradients: with 1e-8 an element whose gradient is rounding noise
    # moves by lr in a direction that noise chose, and no two implementations could agree
    hyper = AdamHyper(lr=1e-2, eps=1e-3, weight_decay=0.1, max_grad_norm=0.5)
    with adapters(engine, a=SPEC):
        start = engine.adapter_state("a").tensors
        oracle = make_oracle(family, folder, torch.float32, SPEC, start)
        held = list(oracle.parameters.values())
        adam = torch.optim.AdamW(held, lr=1e-2, eps=1e-3, weight_decay=0.1)
        for step in range(3):
            groups = some_groups(step)
            engine.forward_backward(weighted_batch("a", groups), {"a": GRPO})
            stats = engine.optim_step({"a": hyper})["a"]
            adam.zero_grad(set_to_none=False)
            grpo_loss(oracle, flat(groups)).backward()
            norm = torch.nn.utils.clip_grad_norm_(held, 0.5).item()
            adam.step()
            assert stats.grad_norm == pytest.approx(norm, rel=FP32) and norm > 0.5
            assert stats.step == step + 1
        got = engine.adapter_state("a").tensors
    assert_close(got, oracle.parameters, FP32)
    # the distance travelled, not only the place: weights that did not move would also be close
    moved = {n: got[n] - t for n, t in start.items()}
    assert_close(moved, {n: p.detach() - start[n] for n, p in oracle.parameters.items()}, 1e-4)


def test_two_calls_accumulate_to_the_gradient_of_one(engine: TrainEngine) -> None:
    with adapters(engine, a=SPEC):
        one, two = some_batch(1), some_batch(2)
        expected = gradients(engine, concatenate([one, two]), {"a": GRPO})["a"]
        engine.forward_backward(one, {"a": GRPO})
        engine.forward_backward(two, {"a": GRPO})
        assert_close(look(engine, "a")["a"], expected, FP32)


def test_only_named_adapters_step(engine: TrainEngine) -> None:
    both = concatenate([some_batch(1), some_batch(2, "b")])
    with adapters(engine, a=SPEC, b=OTHER, c=SPEC):
        before = {name: engine.snapshot(name) for name in "abc"}
        expected = gradients(engine, both, {"a": GRPO, "b": GRPO})["b"]
        engine.forward_backward(both, {"a": GRPO, "b": GRPO})
        assert engine.optim_step({"a": HYPER}).keys() == {"a"}
        assert engine.snapshot("a").step == 1
        assert engine.adapter_state("a").digest() != before["a"].state.digest()
        for name in "bc":
            assert engine.adapter_state(name).digest() == before[name].state.digest()
            assert engine.snapshot(name).step == 0
        assert_equal(look(engine, "b")["b"], expected)  # its gradients waited


def test_a_failed_forward_backward_leaves_no_gradients(engine: TrainEngine) -> None:
    both = concatenate([some_batch(1), some_batch(2, "b")])
    with adapters(engine, a=SPEC, b=OTHER):
        expected = gradients(engine, both, {"a": GRPO, "b": GRPO})
        engine.forward_backward(both, {"a": GRPO, "b": GRPO})
        with pytest.raises(ValueError, match="this one refuses"):
            engine.forward_backward(both, {"a": GRPO, "b": REFUSES})
        for name in "ab":
            with pytest.raises(ValueError, match=f"adapter '{name}': there are no gradients"):
                engine.optim_step({name: HYPER})
        after = gradients(engine, both, {"a": GRPO, "b": GRPO})
        for name in "ab":
            assert_equal(after[name], expected[name])


def test_a_loss_that_is_missing_is_refused(engine: TrainEngine) -> None:
    both = concatenate([some_batch(1), some_batch(2, "b")])
    with adapters(engine, a=SPEC, b=OTHER):
        with pytest.raises(ValueError, match="losses: none given for adapter 'b'"):
            engine.forward_backward(both, {"a": GRPO})
        nowhere = LossSpec(path="tests.contract.losses:nowhere", params={})
        with pytest.raises(ValueError, match="nowhere"):
            engine.forward_backward(both, {"a": GRPO, "b": nowhere})


def test_a_stream_that_is_missing_is_refused_before_any_pass(engine: TrainEngine) -> None:
    dies = LossSpec(path="tests.contract.losses:dies", params={}, streams=("teacher",))
    with adapters(engine, a=SPEC):
        words = "that of adapter 'a' reads the stream .teacher.*it has: .*behaviour"
        with pytest.raises(ValueError, match=words):
            engine.forward_backward(some_batch(1), {"a": dies})


def test_a_batch_without_items_is_refused(engine: TrainEngine) -> None:
    batch = some_batch(1)
    items = replace(batch.items, **{n: getattr(batch.items, n)[:0] for n in ("source", "target")})
    with adapters(engine, a=SPEC), pytest.raises(ValueError, match="no items"):
        engine.logprobs(replace(batch, items=items), "current")


def test_a_step_that_one_adapter_cannot_take_is_taken_by_none(engine: TrainEngine) -> None:
    both = concatenate([some_batch(1), some_batch(2, "b")])
    with adapters(engine, a=SPEC, b=OTHER):
        before = {name: engine.adapter_state(name).digest() for name in "ab"}
        engine.forward_backward(some_batch(1), {"a": GRPO})
        with pytest.raises(ValueError, match="adapter 'b': there are no gradients"):
            engine.optim_step({"a": HYPER, "b": HYPER})
        engine.forward_backward(both, {"a": GRPO, "b": INFINITE})
        with pytest.raises(ValueError, match="adapter 'b': the gradient norm is"):
            engine.optim_step({"a": HYPER, "b": HYPER})
        assert {name: engine.adapter_state(name).digest() for name in "ab"} == before
        expected = gradients(engine, both, {"a": GRPO, "b": GRPO})
        for batch in (some_batch(1), some_batch(2, "b")):
            (name,) = batch.adapters
            alone = gradients(engine, batch, {name: GRPO})[name]
            assert_close(alone, expected[name], FP32)  # nothing was left over


def test_an_unknown_adapter_is_a_key_error_that_names_those_there_are(engine: TrainEngine) -> None:
    batch = some_batch(1, "z")
    with adapters(engine, a=SPEC):
        snapshot = engine.snapshot("a")

        for call in (
            lambda: engine.drop_adapter("z"),
            lambda: engine.adapter_state("z"),
            lambda: engine.snapshot("z"),
            lambda: engine.restore("z", snapshot),
            lambda: engine.logprobs(batch, "current"),
            lambda: engine.forward_backward(batch, {"z": GRPO}),
            lambda: engine.optim_step({"z": HYPER}),
        ):
            with pytest.raises(KeyError, match="no adapter 'z'; there are: a"):
                call()


def test_an_unknown_adapter_beside_a_known_one_changes_nothing(engine: TrainEngine) -> None:
    batch = some_batch(1)
    with adapters(engine, a=SPEC):
        expected = gradients(engine, batch, {"a": GRPO})["a"]
        engine.forward_backward(batch, {"a": GRPO})
        with pytest.raises(KeyError):
            engine.optim_step({"a": HYPER, "z": HYPER})
        assert_equal(look(engine, "a")["a"], expected)


def test_adapters_that_cannot_be_added_are_value_errors(engine: TrainEngine) -> None:
    with adapters(engine, a=SPEC):
        with pytest.raises(ValueError, match="'a' exists already"):
            engine.add_adapter("a", SPEC)
        with pytest.raises(ValueError, match="did you mean 'q_proj'"):
            engine.add_adapter("b", replace(SPEC, target_modules=("q_prj",)))


def test_a_restored_snapshot_goes_on_bit_for_bit(engine: TrainEngine) -> None:
    def train(steps: range) -> None:
        for step in steps:
            engine.forward_backward(some_batch(step), {"a": GRPO})
            engine.optim_step({"a": HYPER})

    with adapters(engine, a=SPEC):
        train(range(2))
        middle = engine.snapshot("a")
        train(range(2, 4))
        end = engine.snapshot("a")
        engine.drop_adapter("a")
        engine.add_adapter("a", SPEC, seed=5)
        engine.restore("a", middle)
        again = engine.snapshot("a")
        assert again.step == middle.step == 2
        for field in ("exp_avg", "exp_avg_sq"):
            assert_equal(getattr(again, field), getattr(middle, field))
        assert_equal(again.state.tensors, middle.state.tensors)
        train(range(2, 4))
        redone = engine.snapshot("a")
    assert redone.step == end.step == 4
    assert_equal(redone.state.tensors, end.state.tensors)
    assert_equal(redone.exp_avg, end.exp_avg)
    assert_equal(redone.exp_avg_sq, end.exp_avg_sq)


def test_a_snapshot_is_a_copy(engine: TrainEngine) -> None:
    with adapters(engine, a=SPEC):
        snapshot = engine.snapshot("a")
        digest = snapshot.state.digest()
        engine.forward_backward(some_batch(1), {"a": GRPO})
        engine.optim_step({"a": HYPER})
        assert snapshot.state.digest() == digest
        assert not any(t.any() for t in snapshot.exp_avg.values())


def test_restoring_drops_gradients(engine: TrainEngine) -> None:
    with adapters(engine, a=SPEC):
        snapshot = engine.snapshot("a")
        engine.forward_backward(some_batch(1), {"a": GRPO})
        engine.restore("a", snapshot)
        with pytest.raises(ValueError, match="no gradients"):
            engine.optim_step({"a": HYPER})


def test_a_snapshot_that_does_not_fit_is_refused_and_changes_nothing(engine: TrainEngine) -> None:
    with adapters(engine, a=SPEC, b=OTHER):
        before, other = engine.adapter_state("a").digest(), engine.snapshot("b")
        with pytest.raises(ValueError, match="adapter 'a': the snapshot is of"):
            engine.restore("a", other)
        lacking = replace(engine.snapshot("a"), exp_avg={})
        with pytest.raises(ValueError, match="is missing"):
            engine.restore("a", lacking)
        assert engine.adapter_state("a").digest() == before


def test_an_adapter_dropped_and_added_again_is_fresh(engine: TrainEngine) -> None:
    engine.add_adapter("a", SPEC, seed=3)
    fresh = engine.snapshot("a")
    engine.forward_backward(some_batch(1), {"a": GRPO})
    engine.optim_step({"a": HYPER})
    engine.drop_adapter("a")
    with pytest.raises(KeyError):
        engine.adapter_state("a")
    with adapters(engine):
        engine.add_adapter("a", SPEC, seed=3)
        again = engine.snapshot("a")
        base = engine.logprobs(some_batch(1), BASE).logprobs
        current = engine.logprobs(some_batch(1), "current").logprobs
        engine.drop_adapter("a")
    assert again.state.digest() == fresh.state.digest() and again.step == 0
    assert not any(t.any() for t in again.exp_avg.values())
    assert any(t.any() for t in again.state.tensors.values())
    np.testing.assert_array_equal(base, current)  # B is zero


def test_a_policy_is_the_base_or_the_state_that_is_held(
    engine: TrainEngine, family: str, folder: Path
) -> None:
    spec = SPEC if family == "qwen3_moe" else HEAD  # an adapted head has a path of its own
    groups = some_groups(1)
    turns = [t for r in flat(groups) for t in r.turns]
    batch = weighted_batch("a", groups)

    def expect(state: AdapterState | None) -> None:
        oracle = BaseOracle(folder, torch.float32)
        if state is not None:
            oracle = make_oracle(family, folder, torch.float32, spec, state.tensors)
        policy = BASE if state is None else "earlier"
        expected = torch.cat([pair[0] for pair in turn_logprobs(oracle, turns, 1.0)]).detach()
        got = torch.from_numpy(engine.logprobs(batch, policy).logprobs)
        assert_close({"": got}, {"": expected}, FP32)

    with adapters(engine, a=spec):
        expect(None)
        state = engine.adapter_state("a")
        engine.hold("earlier", state)
        randomise(engine, "a", seed=9)
        engine.forward_backward(batch, {"a": GRPO})
        engine.optim_step({"a": HYPER})
        expect(state)
        expect(None)
        engine.release("earlier")
        with pytest.raises(KeyError):
            engine.logprobs(batch, "earlier")


def test_several_policies_are_held_at_once_replaced_and_forgotten(
    engine: TrainEngine, plain: TrainEngine
) -> None:
    """The reference is another engine's own adapter, as it is trained."""
    both = concatenate([some_batch(1), some_batch(2, "b")])

    def expect(policy: str, state: AdapterState) -> None:
        zeros = {n: torch.zeros_like(t) for n, t in state.tensors.items()}
        moments = {"exp_avg": zeros, "exp_avg_sq": zeros, "step": 0}
        with adapters(plain, a=state.spec, b=state.spec):
            for name in "ab":  # every segment is read under the one policy
                plain.restore(name, AdapterSnapshot(state=state, **moments))
            expected = plain.logprobs(both, CURRENT)
        got = engine.logprobs(both, policy)
        np.testing.assert_allclose(got.logprobs, expected.logprobs, rtol=FP32, atol=FP32)
        np.testing.assert_allclose(got.entropy, expected.entropy, rtol=FP32, atol=FP32)

    with adapters(engine, a=SPEC, b=OTHER):
        one, two = (engine.adapter_state(name) for name in "ab")
        three = randomise(engine, "a", seed=9)
        engine.hold("reference", one)
        engine.hold("teacher", two)  # of another rank and other targets
        expect("reference", one)
        expect("teacher", two)
        engine.hold("teacher", three)
        expect("teacher", three)
        expect("reference", one)
        engine.release("reference")
        expect("teacher", three)
        words = "no policy 'reference' is held; there are: current, base, teacher"
        for call in (
            lambda: engine.logprobs(both, "reference"),
            lambda: engine.release("reference"),
        ):
            with pytest.raises(KeyError, match=words):
                call()
        engine.release("teacher")


def test_a_policy_that_cannot_be_held_is_refused(engine: TrainEngine) -> None:
    with adapters(engine, a=SPEC):
        state = engine.adapter_state("a")
        for name in (CURRENT, BASE):
            with pytest.raises(ValueError, match=f"policy: '{name}'"):
                engine.hold(name, state)
        with pytest.raises(ValueError, match="is missing"):
            engine.hold("earlier", replace(state, tensors={}))
        with pytest.raises(KeyError, match="no policy 'earlier' is held"):
            engine.logprobs(some_batch(1), "earlier")


def test_a_stream_of_any_name_reaches_the_loss_token_by_token(
    engine: TrainEngine, plain: TrainEngine
) -> None:
    assert_a_stream_arrives(engine, plain, FP32)


def test_each_adapter_of_a_mixed_batch_has_its_own_loss_and_gradient(engine: TrainEngine) -> None:
    specs = {"a": SPEC, "b": OTHER, "c": HEAD}
    losses = {"a": GRPO, "b": LIKELIHOOD, "c": DECOUPLED}
    batches = {name: some_batch(seed, name) for seed, name in enumerate(specs)}
    held = batches["b"].items
    # a stream that only one of the adapters has
    streams = {**held.streams, "proximal": held.streams["behaviour"]}
    batches["b"] = replace(batches["b"], items=replace(held, streams=streams))
    with adapters(engine, **specs):
        mixed = concatenate([*batches.values()])
        outputs = engine.forward_backward(mixed, losses)
        got = look(engine, *specs)
        start = 0
        for name, batch in batches.items():
            alone = engine.forward_backward(batch, {name: losses[name]})
            assert_close(got[name], look(engine, name)[name], FP32)
            assert outputs.loss[name] == pytest.approx(alone.loss[name], rel=FP32)
            assert outputs.metrics[name] == pytest.approx(alone.metrics[name], rel=FP32, abs=1e-7)
            rows = slice(start, start + len(batch.items))
            np.testing.assert_allclose(
                outputs.items.logprobs[rows], alone.items.logprobs, rtol=FP32, atol=FP32
            )
            start = rows.stop


def test_shared_prefixes_change_nothing(engine: TrainEngine) -> None:
    batch = some_batch(1)
    apart = flatten(batch)
    assert len(apart.segments) > sum(s.parent < 0 for s in batch.segments)
    with adapters(engine, a=SPEC):
        together = gradients(engine, batch, {"a": GRPO})["a"]
        assert_close(gradients(engine, apart, {"a": GRPO})["a"], together, FP32)


def test_how_an_engine_lays_out_a_batch_changes_nothing(
    engine: TrainEngine, plain: TrainEngine
) -> None:
    assert_computes_the_same(engine, plain)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("max_tokens", [1, SMALL, 40])
def test_micro_batches_and_recomputation_change_nothing(
    max_tokens: int, recompute: bool, folder: Path, plain: TrainEngine
) -> None:
    assert_computes_the_same(archon_engine(load_decoder(folder), max_tokens, recompute), plain)


def assert_computes_the_same(engine: TrainEngine, plain: TrainEngine) -> None:
    batch = concatenate([some_batch(1), some_batch(2, "b"), some_batch(3)])
    assert len(pieces(batch, SMALL)) > len(pieces(batch, 10_000))  # trees are split, too
    losses = {"a": GRPO, "b": DECOUPLED}
    with adapters(engine, a=SPEC, b=OTHER), adapters(plain, a=SPEC, b=OTHER):
        expected = plain.forward_backward(batch, losses)
        outputs = engine.forward_backward(batch, losses)
        reference, got = look(plain, "a", "b"), look(engine, "a", "b")
    for name in "ab":
        assert_close(got[name], reference[name], FP32)
        assert outputs.loss[name] == pytest.approx(expected.loss[name], rel=FP32)
        assert outputs.metrics[name] == pytest.approx(expected.metrics[name], rel=FP32)
    np.testing.assert_allclose(outputs.items.logprobs, expected.items.logprobs, rtol=FP32)
    np.testing.assert_allclose(outputs.items.entropy, expected.items.entropy, rtol=FP32)


def test_turns_and_rewritten_histories_train_every_sampled_token_once(
    engine: TrainEngine, family: str, folder: Path
) -> None:
    rng = np.random.default_rng(4)
    ask, say, more = (rng.integers(3, 300, n).tolist() for n in (8, 11, 5))
    group = [
        rollout(turn(ask, say), turn([*ask, *say, 4, 5], more), reward=0.7),
        # the second prompt keeps the question and rewrites the answer
        rollout(turn(ask, say[:4]), turn([*ask, 6, 7], more), turn([8, 9], [1]), reward=-0.4),
        rollout(turn(ask, [2]), reward=1.1),
    ]
    with adapters(engine, a=SPEC):
        tensors = engine.adapter_state("a").tensors
        oracle = make_oracle(family, folder, torch.float32, SPEC, tensors)
        grpo_loss(oracle, group).backward()
        got = gradients(engine, weighted_batch("a", [group]), {"a": GRPO})["a"]
    reached = {n: p.grad for n, p in oracle.parameters.items() if p.grad is not None}
    assert_close({n: got[n] for n in reached}, reached, FP32)


def test_the_same_calls_give_the_same_bits(engine: TrainEngine) -> None:
    batch = concatenate([some_batch(1), some_batch(2, "b")])
    specs = {"a": SPEC, "b": replace(OTHER, dropout=0.2)}
    ends: list[list[str]] = []
    for _ in range(2):
        with adapters(engine, **specs):
            for _ in range(2):
                engine.forward_backward(batch, {"a": GRPO, "b": DECOUPLED})
                engine.optim_step({"a": HYPER, "b": HYPER})
            ends.append([engine.adapter_state(name).digest() for name in specs])
    assert ends[0] == ends[1]


def test_offload_and_onload_lose_nothing(engine: TrainEngine) -> None:
    with adapters(engine, a=SPEC):
        expected = gradients(engine, some_batch(1), {"a": GRPO})["a"]
        engine.offload()
        engine.onload()
        assert_equal(gradients(engine, some_batch(1), {"a": GRPO})["a"], expected)
