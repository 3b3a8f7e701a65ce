"""A job of reinforcement learning: what it makes of groups, and what it says of a step."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lorelei.algo.grpo import Grpo
from lorelei.algo.rloo import leave_one_out
from lorelei.config.experiment import Experiment
from lorelei.jobs.evaluation import EvaluationLog
from lorelei.jobs.rl import RlJob, policy_work
from lorelei.model.decoder import Decoder
from lorelei.model.load import load_decoder
from lorelei.obs.console import Console
from lorelei.rollout.admission import Admission
from lorelei.rollout.collector import Collector
from lorelei.rollout.sampler import Policy
from lorelei.run_file import validate
from lorelei.store.run import RunStore
from lorelei.store.spool import Spool
from lorelei.train.archon.engine import archon_engine
from lorelei.train.batch import rollout_batch
from lorelei.train.contract import TrainEngine
from lorelei.train.step import run_works
from lorelei.types import (
    BASE,
    CURRENT,
    AdapterRef,
    AdapterSpec,
    Batch,
    Group,
    Prompt,
    Rollout,
    SamplingParams,
)
from tests.episodes import random_group, rollout, turn
from tests.tiny_models import make_tiny

SPEC = AdapterSpec(rank=4, alpha=8, target_modules=("q_proj", "down_proj"))
STEPS = 10


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return load_decoder(make_tiny("llama", tmp_path_factory.mktemp("llama")))


@pytest.fixture
def engine(decoder: Decoder) -> Iterator[TrainEngine]:
    with closing(archon_engine(decoder)) as made:
        made.add_adapter("a", SPEC)
        yield made


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    with closing(RunStore.create(tmp_path / "run", {})) as made:
        yield made


def experiment(algo: Mapping[str, object] = {}, **sections: object) -> Experiment:
    config = validate(
        {
            "model": "tiny",
            "steps": STEPS,
            "task": {"kind": "reasoning_gym", "name": "chain_sum"},
            "algo": {"batch_size": 2, "lr": 1e-2, **algo},
            "adapters": {"a": {}},
            **sections,
        }
    )
    return config.experiments()[0]


def make_job(e: Experiment, groups: Sequence[Group], store: RunStore, version: int = 0) -> RlJob:
    """A job that has collected its batch and samples no more: no engine is asked."""
    admission = Admission(
        batch_size=2,
        max_staleness=9,
        max_concurrent=1,
        version=version,
        accepted=STEPS * 2,
    )
    collector = Collector(
        experiment=e,
        algo=e.algo,  # type: ignore[arg-type]  # of a run that samples
        source=None,  # type: ignore[arg-type]
        env=None,  # type: ignore[arg-type]
        policy=Policy(ref=None, sampling=SamplingParams(), stream="a", decode=str),
        admission=admission,
        engine=None,  # type: ignore[arg-type]
        spool=Spool(store.folder),
        finished=list(groups),
    )
    console = Console({"a": STEPS}, io.StringIO())
    return RlJob(
        experiment=e,
        algo=e.algo,  # type: ignore[arg-type]
        collector=collector,
        evaluator=None,
        evaluations=EvaluationLog(adapter="a", store=store, console=console),
        watched=None,
        store=store,
        version=version,
    )


def step(engine: TrainEngine, job: RlJob) -> dict[str, float]:
    """What the job says of its next step."""

    async def body() -> dict[str, float]:
        (result,) = run_works(engine, [await job.work()])
        ref = AdapterRef(name="a", version=job.version + 1, run_id="r", digest="0" * 64)
        return dict(await job.tell(result, ref))

    return asyncio.run(body())


def group(rollouts: Sequence[Rollout], index: int = 0) -> Group:
    messages = ({"role": "user", "content": f"prompt {index}"},)
    tokens = rollouts[0].turns[0].prompt
    prompt = Prompt(id=str(index), tokens=tokens, messages=messages, data={})
    return Group(adapter="a", index=index, prompt=prompt, rollouts=tuple(rollouts))


def two_groups(seed: int = 0) -> list[Group]:
    rng = np.random.default_rng(seed)
    return [group(random_group(rng, 6, [4, 1, 5]), 0), group(random_group(rng, 3, [2, 6]), 1)]


def test_the_numbers_of_a_step_are_those_of_its_rollouts(
    engine: TrainEngine, store: RunStore
) -> None:
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
    job = make_job(experiment({"lr_schedule": "linear"}), groups, store, version=5)
    job.collector.errors.update({"environment raised": 1, "stale": 2})
    flat = group([sample(1.0, 4, 5), sample(1.0, 2, 5)], 2)
    unscored = replace(flat, index=3, rollouts=(failed,))
    job.collector.dropped += [("flat", flat), ("failed", unscored)]
    got = step(engine, job)
    expected = {
        "step": 6,
        "reward": 0.5,
        "reward_std": np.std([1.0, 0.0, 0.5, 0.5]),
        "flat_groups": 0.5,
        "failed_rollouts": 1,
        "generated_tokens": 8,
        "trained_tokens": 8,
        "completion_tokens_mean": 2.0,
        "turns_mean": 1.0,
        "truncated": 0.25,
        "staleness_mean": 1.0,
        "staleness_max": 2,
        "staleness/0": 4,
        "staleness/1": 3,
        "staleness/2": 1,
        "reward/strict": 0.25,
        "optimizer_step": 1,
        "lr": 1e-2 * 0.5,
        "dropped_stale": 0.5,
        "dropped_groups": 2,
        "dropped_groups/flat": 1,
        "dropped_groups/failed": 1,
        "dropped_groups/stale": 0,
        "dropped_rollouts": 3,
        "dropped_tokens": 6,
        "reward_sampled": 4 / 6,
    }
    assert {name: got[name] for name in expected} == pytest.approx(expected)
    assert got["errors"] == {"environment raised": 1, "stale": 2}
    assert job.collector.errors == {} and job.collector.dropped == [], "they are of one step"
    assert got["grad_norm"] > 0 and got["train_seconds"] > 0
    assert (job.version, job.reward, job.done) == (6, 0.5, False)
    assert job.state()["reward"] == 0.5 and job.state()["pending"] == []
    lines = (store.folder / "rollouts.jsonl").read_text().splitlines()
    logged = [(r["reward"], r.get("dropped")) for r in map(json.loads, lines)]
    trained = [(reward, None) for reward in (1.0, 0.0, None, 0.5, 0.5)]
    assert logged == [*trained, (1.0, "flat"), (1.0, "flat"), (None, "failed")]


def batch_of(e: Experiment, values: Sequence[Sequence[float]], groups: Sequence[Group]) -> Batch:
    """A minibatch made by hand: each rollout has its advantage, each token the same weight."""
    rollouts = [g.rollouts for g in groups]
    credit = [
        [np.full(r.sampled_tokens, v, np.float32) for r, v in zip(rs, own, strict=True)]
        for rs, own in zip(rollouts, values, strict=True)
    ]
    batch = rollout_batch("a", rollouts, {"advantage": credit}, e.rollout.temperature)
    weight = np.full(len(batch.items), 1 / len(batch.items), dtype=np.float32)
    return replace(batch, items=replace(batch.items, weight=weight))


def rewards_of(g: Group) -> np.ndarray:
    return np.array([r.reward for r in g.rollouts], dtype=np.float32)


def assert_same(one: Batch, other: Batch) -> None:
    assert len(one.segments) == len(other.segments)
    for field in ("source", "target", "weight", "temperature", "sequence"):
        np.testing.assert_allclose(getattr(one.items, field), getattr(other.items, field))
    assert one.items.streams.keys() == other.items.streams.keys()
    for name, values in one.items.streams.items():
        np.testing.assert_allclose(values, other.items.streams[name], rtol=1e-5, atol=1e-6)


def test_minibatches_share_the_credit_of_the_whole_batch_and_weigh_their_own_tokens() -> None:
    # the baseline of a batch: it is of no single minibatch
    e = experiment(
        {"ppo_n_minibatches": 2, "adv_norm": {"mean_level": "batch", "std_level": "none"}}
    )
    groups = two_groups()
    assert isinstance(e.algo, Grpo)
    work = policy_work(e, e.algo, groups, version=3)
    mean = np.concatenate([rewards_of(g) for g in groups]).mean()
    for g, one in zip(groups, work.rounds, strict=True):
        assert_same(one.batch, batch_of(e, [list(rewards_of(g) - mean)], [g]))
        assert one.loss == e.algo.loss() and one.step == e.optimizer.at(3, STEPS)
    assert (work.steps, work.publish, work.last) == (2, True, False)
    assert work.policies == {"proximal": CURRENT}
    assert policy_work(e, e.algo, groups, version=STEPS - 1).last


def test_a_reference_is_asked_for_only_where_the_loss_has_a_weight_for_it() -> None:
    for algo, policies in (
        ({}, {}),
        ({"kl_ctl": 0.2}, {"reference": BASE}),
        ({"kind": "rloo", "ppo_n_minibatches": 2}, {}),
    ):
        e = experiment(algo)
        work = policy_work(e, e.algo, two_groups(), version=0)  # type: ignore[arg-type]
        assert work.policies == policies


def test_rollouts_without_a_reward_are_not_trained_on(
    engine: TrainEngine, decoder: Decoder, store: RunStore
) -> None:
    e, groups = experiment({"kind": "rloo"}), two_groups()
    bad = replace(random_group(np.random.default_rng(7), 6, [3])[0], reward=None, error="timeout")
    worse = [replace(g, rollouts=(*g.rollouts, bad)) for g in groups]
    work = policy_work(e, e.algo, worse, version=0)  # type: ignore[arg-type]
    values = [list(leave_one_out(rewards_of(g))) for g in groups]
    assert_same(work.rounds[0].batch, batch_of(e, values, groups))
    got = step(engine, make_job(e, worse, store))
    with closing(archon_engine(decoder)) as clean:
        clean.add_adapter("a", SPEC)
        step(clean, make_job(e, groups, store))
        assert engine.adapter_state("a").digest() == clean.adapter_state("a").digest()
    assert got["failed_rollouts"] == 2
    assert got["generated_tokens"] == got["trained_tokens"] + 6


def test_failures_within_groups_are_told_at_once_and_then_ever_less_often(
    engine: TrainEngine, store: RunStore
) -> None:
    told = io.StringIO()
    warned: list[int] = []
    job = make_job(experiment(), two_groups(), store)
    job.evaluations.console = Console({"a": STEPS}, told)
    for number in range(8):
        job.collector.finished = two_groups(number)
        job.collector.partly_failed = 1
        job.collector.errors.update({"raised IndexError": 3})
        assert step(engine, job)["partly_failed_groups"] == 1
        warned.append(told.getvalue().count("training is biased"))
    assert warned == [1, 1, 2, 2, 2, 2, 3, 3]
    assert "in 1 groups some rollouts have no reward" in told.getvalue()
    assert "raised IndexError: 3" in told.getvalue()


def test_the_mismatch_is_measured_before_the_update(engine: TrainEngine, store: RunStore) -> None:
    e, groups = experiment({"ppo_n_minibatches": 2}), two_groups()
    batch = batch_of(e, [[0.0] * 3], groups[:1])  # later minibatches: the policy has moved
    outputs = engine.logprobs(batch, CURRENT)
    log_ratio = outputs.logprobs - batch.items.streams["behaviour"]
    got = step(engine, make_job(e, groups, store))
    assert got["ratio_max"] == pytest.approx(np.exp(np.abs(log_ratio).max()), rel=1e-5)
    assert got["kl_sampler"] == pytest.approx(np.mean(np.exp(log_ratio) - 1 - log_ratio), rel=1e-5)
    assert got["ratio_mean"] == pytest.approx(np.exp(log_ratio).mean(), rel=1e-5)
    assert got["entropy"] == pytest.approx(outputs.entropy.mean(), rel=1e-5)
    assert got["optimizer_step"] == 2


def test_what_the_trainer_itself_would_have_said_is_no_mismatch(
    engine: TrainEngine, store: RunStore
) -> None:
    e, groups = experiment(), two_groups()
    batch = batch_of(e, [[0.0] * 3, [0.0] * 2], groups)
    logprobs = iter(engine.logprobs(batch, CURRENT).logprobs)

    def true(r: Rollout) -> Rollout:
        (only,) = r.turns
        own = np.array([next(logprobs) for _ in only.completion.tokens], dtype=np.float32)
        completion = replace(only.completion, logprobs=own)
        return replace(r, turns=(replace(only, completion=completion),))

    groups = [replace(g, rollouts=tuple(map(true, g.rollouts))) for g in groups]
    got = step(engine, make_job(e, groups, store))
    assert got["ratio_max"] == pytest.approx(1, abs=1e-5)
    assert got["kl_sampler"] == pytest.approx(0, abs=1e-6)
    assert got["clipped"] == 0
