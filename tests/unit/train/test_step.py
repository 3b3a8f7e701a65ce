"""One training step on a tiny model: what it updates, and the numbers it reports."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from lorelei.algo.preset import adam_hyper, advantages, loss_spec

from lorelei.config.experiment import Experiment
from lorelei.config.run import RunConfig
from lorelei.model.decoder import Decoder
from lorelei.model.load import load_decoder
from lorelei.train.archon.engine import archon_engine
from lorelei.train.batch import build_batch
from lorelei.train.contract import TrainEngine
from lorelei.train.step import Trainer
from lorelei.types import AdapterSpec, Batch, Group, Prompt, Rollout, StepStats
from tests.episodes import random_group, rollout, turn
from tests.tiny_models import make_tiny

SPEC = AdapterSpec(rank=4, alpha=8, target_modules=("q_proj", "down_proj"))


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


def experiments(**algo: Mapping[str, object]) -> dict[str, Experiment]:
    """{adapter: experiment}, given what is special about each one's algorithm."""
    config = RunConfig.model_validate(
        {
            "model": "tiny",
            "steps": 10,
            "task": {"kind": "reasoning_gym", "name": "chain_sum"},
            "algo": {"batch_size": 2, "lr": 1e-2},
            "adapters": {name: {"algo": dict(fields)} for name, fields in algo.items()},
        }
    )
    return {e.name: e for e in config.experiments()}


def group(rollouts: Sequence[Rollout], index: int = 0) -> Group:
    prompt = Prompt(id=str(index), tokens=rollouts[0].turns[0].prompt, messages=(), data={})
    return Group(adapter=rollouts[0].adapter, index=index, prompt=prompt, rollouts=tuple(rollouts))


def two_groups(adapter: str, seed: int = 0) -> list[Group]:
    rng = np.random.default_rng(seed)
    return [
        group(random_group(rng, 6, [4, 1, 5], adapter), 0),
        group(random_group(rng, 3, [2, 6], adapter), 1),
    ]


def step(
    engine: TrainEngine,
    plan: Mapping[str, Experiment],
    groups: Mapping[str, Sequence[Group]],
    version: int = 0,
) -> StepStats:
    trainer = Trainer(engine, plan)
    return asyncio.run(trainer.step(groups, dict.fromkeys(plan, version)))


def batch_of(experiment: Experiment, groups: Sequence[Group], part: slice = slice(None)) -> Batch:
    """A minibatch made by hand: advantages from the whole batch, token weights from the part."""
    rollouts = [g.rollouts for g in groups]
    rewards = np.array([r.reward for rs in rollouts for r in rs], dtype=np.float32)
    counts = [len(rs) for rs in rollouts]
    values = advantages(experiment.algo, rewards, np.repeat(np.arange(len(counts)), counts))
    split = np.split(values, np.cumsum(counts)[:-1])
    batch = build_batch(experiment.name, rollouts[part], split[part], 1.0)
    weight = np.full(len(batch.items), 1 / len(batch.items), dtype=np.float32)
    return replace(batch, items=replace(batch.items, weight=weight))


def test_the_numbers_of_a_step_are_those_of_its_rollouts(engine: TrainEngine) -> None:
    def sample(reward: float, count: int, version: int) -> Rollout:
        return rollout(turn([5, 6], list(range(count)), version=version), reward=reward)

    failed = Rollout(adapter="a", sample=2, turns=(), reward=None, error="environment raised")
    told = replace(sample(0.0, 3, 4), metrics={"strict": 1.0})
    cut = sample(1.0, 1, 3)
    (last,) = cut.turns
    cut = replace(
        cut, turns=(replace(last, completion=replace(last.completion, finish_reason="length")),)
    )
    groups = [group([cut, told, failed], 0), group([sample(0.5, 2, 5), sample(0.5, 2, 5)], 1)]
    plan = experiments(a={"lr_schedule": "linear"})
    stats = step(engine, plan, {"a": groups}, version=5)
    assert stats.touched == ("a",)
    got = stats.metrics["a"]
    expected = {
        "reward": 0.5,
        "reward_std": np.std([1.0, 0.0, 0.5, 0.5]),
        "flat_groups": 0.5,
        "failed_rollouts": 1,
        "trained_tokens": 8,
        "completion_tokens_mean": 2.0,
        "truncated": 0.25,
        "staleness_mean": 1.0,
        "staleness_max": 2,
        "reward/strict": 0.25,
        "optimizer_step": 1,
        "lr": 1e-2 * 0.5,
    }
    assert {name: got[name] for name in expected} == pytest.approx(expected)
    assert got["grad_norm"] > 0 and got["train_seconds"] > 0


def test_a_step_is_one_forward_backward_and_one_optimizer_step(
    engine: TrainEngine, decoder: Decoder
) -> None:
    plan, groups = experiments(a={}), two_groups("a")
    stats = step(engine, plan, {"a": groups}, version=3)
    by_hand = archon_engine(decoder)
    by_hand.add_adapter("a", SPEC, 0)
    algo = plan["a"].algo
    batch = batch_of(plan["a"], groups)
    outputs = by_hand.forward_backward(batch, {"a": loss_spec(algo)})
    taken = by_hand.optim_step({"a": adam_hyper(algo, 3, 10)})
    assert engine.adapter_state("a").digest() == by_hand.adapter_state("a").digest()
    got = stats.metrics["a"]
    assert got["grad_norm"] == taken["a"].grad_norm
    assert got["loss"] == outputs.loss["a"]
    log_ratio = outputs.items.logprobs - batch.items.behaviour
    assert got["ratio_max"] == pytest.approx(np.exp(np.abs(log_ratio).max()))
    assert got["kl_sampler"] == pytest.approx(np.mean(np.exp(log_ratio) - 1 - log_ratio), rel=1e-5)
    assert got["entropy"] == pytest.approx(outputs.items.entropy.mean())


def test_minibatches_step_in_turn_against_the_policy_of_the_start(
    engine: TrainEngine, decoder: Decoder
) -> None:
    # a narrow clip: it bites as soon as the first minibatch has moved the policy
    plan = experiments(a={"ppo_n_minibatches": 2, "kl_ctl": 0.2, "eps_clip": 1e-3})
    groups = two_groups("a")
    stats = step(engine, plan, {"a": groups})
    by_hand = archon_engine(decoder)
    by_hand.add_adapter("a", SPEC, 0)
    algo = plan["a"].algo
    batches: list[Batch] = []
    for number in range(2):
        batch = batch_of(plan["a"], groups, slice(number, number + 1))
        start = by_hand.logprobs(batch, "current").logprobs
        base = by_hand.logprobs(batch, "reference").logprobs
        items = replace(batch.items, proximal=start, reference=base)
        batches.append(replace(batch, items=items))
    for batch in batches:
        outputs = by_hand.forward_backward(batch, {"a": loss_spec(algo)})
        by_hand.optim_step({"a": adam_hyper(algo, 0, 10)})
    assert stats.metrics["a"]["optimizer_step"] == 2
    assert stats.metrics["a"]["clipped"] == outputs.metrics["a"]["clipped"] > 0
    assert stats.metrics["a"]["kl_reference"] == outputs.metrics["a"]["kl_reference"] > 0
    assert engine.adapter_state("a").digest() == by_hand.adapter_state("a").digest()


def test_adapters_of_different_algorithms_step_together_as_alone(
    engine: TrainEngine, decoder: Decoder
) -> None:
    plan = experiments(
        a={"ppo_n_minibatches": 2, "eps": 1e-3},
        b={"kind": "rloo", "kl_ctl": 0.1, "eps": 1e-3},
        c={"eps": 1e-3},
    )
    groups = {name: two_groups(name, seed) for seed, name in enumerate("ab")}
    resting = engine.snapshot("c").state.digest()
    stats = step(engine, plan, groups)
    assert set(stats.touched) == {"a", "b"}
    assert engine.snapshot("c").state.digest() == resting
    for seed, name in enumerate("ab"):
        alone = archon_engine(decoder)
        alone.add_adapter(name, SPEC, seed)
        single = step(alone, plan, {name: groups[name]})
        for field, value in single.metrics[name].items():
            if field != "train_seconds":
                assert stats.metrics[name][field] == pytest.approx(value, rel=1e-4, abs=1e-6)
        one, other = alone.adapter_state(name), engine.adapter_state(name)
        for tensor_name, tensor in one.tensors.items():
            np.testing.assert_allclose(other.tensors[tensor_name], tensor, atol=1e-5)


def test_what_the_trainer_itself_would_have_said_is_no_mismatch(engine: TrainEngine) -> None:
    plan, groups = experiments(a={}), two_groups("a")
    batch = batch_of(plan["a"], groups)
    logprobs = iter(engine.logprobs(batch, "current").logprobs)

    def true(r: Rollout) -> Rollout:
        (only,) = r.turns
        own = np.array([next(logprobs) for _ in only.completion.tokens], dtype=np.float32)
        completion = replace(only.completion, logprobs=own)
        return replace(r, turns=(replace(only, completion=completion),))

    groups = [replace(g, rollouts=tuple(map(true, g.rollouts))) for g in groups]
    got = step(engine, plan, {"a": groups}).metrics["a"]
    assert got["ratio_max"] == pytest.approx(1, abs=1e-5)
    assert got["kl_sampler"] == pytest.approx(0, abs=1e-6)
    assert got["clipped"] == 0


def test_rollouts_without_a_reward_are_not_trained_on(
    engine: TrainEngine, decoder: Decoder
) -> None:
    plan, groups = experiments(a={}), two_groups("a")
    bad = replace(random_group(np.random.default_rng(7), 6, [3])[0], reward=None, error="timeout")
    worse = [replace(g, rollouts=(*g.rollouts, bad)) for g in groups]
    stats = step(engine, plan, {"a": worse})
    clean = archon_engine(decoder)
    clean.add_adapter("a", SPEC, 0)
    step(clean, plan, {"a": groups})
    assert stats.metrics["a"]["failed_rollouts"] == 2
    assert engine.adapter_state("a").digest() == clean.adapter_state("a").digest()
