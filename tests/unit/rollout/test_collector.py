"""The collector: whose groups run, which are kept, and what a batch is made of.

The engine here is a few lines that can be told to wait, fail and die, which a real one cannot.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from lorelei.algo.grpo import Grpo
from lorelei.env.contract import Episode, Sampler
from lorelei.inference.contract import EngineClosed
from lorelei.reward.contract import RewardResult
from lorelei.reward.contract import Sample as RewardSample
from lorelei.reward.group import current_member
from lorelei.rollout.admission import Admission
from lorelei.rollout.collector import MAX_CONSECUTIVE_FAILED_GROUPS, Collector, RolloutsFail
from lorelei.rollout.sampler import Policy
from lorelei.run_file import validate
from lorelei.store.spool import Spool
from lorelei.types import AdapterRef, Completion, GenerateRequest, Group, Prompt, SamplingParams
from tests.tiny_runs import tiny_run

T = TypeVar("T")


class Script:
    """A rollout engine and an environment. `wait` and `fail` get (adapter, prompt, sample)."""

    def __init__(self) -> None:
        self.wait: Callable[[str, int, int], Coroutine[Any, Any, object]] = self._soon
        self.fail: Callable[[str, int, int], Exception | None] = lambda *_: None
        self.reward: Callable[[str, int, int], float | None] = lambda *where: float(where[2])
        self.started: list[tuple[str, int, int]] = []

    async def _soon(self, *_: object) -> None:
        await asyncio.sleep(0)

    async def generate(self, request: GenerateRequest) -> Completion:
        adapter, place, _, _ = request.key.replace("/", " ").split()
        sample = int(request.key.split("/")[2])
        where = (adapter, int(place), sample)
        self.started.append(where)
        version = request.adapter.version if request.adapter else 0
        await self.wait(*where)
        if (error := self.fail(*where)) is not None:
            raise error
        return Completion(
            tokens=np.array([sample + 1], dtype=np.int32),
            logprobs=np.array([-1.0], dtype=np.float32),
            versions=((version, 1),),
            finish_reason="stop",
        )

    def indices(self, adapter: str) -> list[int]:
        """The prompts started so far, in order."""
        return list(dict.fromkeys(i for name, i, _ in self.started if name == adapter))


class Numbers:
    """Prompts that are their own index."""

    def prompt(self, index: int) -> Prompt:
        tokens = np.array([index], dtype=np.int32)
        return Prompt(id=str(index), tokens=tokens, messages=(), data={})

    def eval_prompts(self, n: int) -> list[Prompt]:
        return []


class OneTurn:
    """Rewards by the script."""

    def __init__(self, script: Script, adapter: str) -> None:
        self._script, self._adapter = script, adapter

    async def run(self, prompt: Prompt, sample: Sampler) -> Episode:
        turn = await sample(prompt.tokens)
        number = int(turn.completion.tokens[0]) - 1
        reward = self._script.reward(self._adapter, int(prompt.id), number)
        error = None if reward is not None else "timeout: the reward took too long"
        return Episode(turns=(turn,), reward=reward, error=error)


def make_all(
    folder: Path, script: Script, adapters: Mapping[str, Mapping[str, Any]], **sections: Any
) -> dict[str, Collector]:
    """Collectors on one engine and one spool, as adapters of a run have them."""
    config = validate(tiny_run(adapters=dict(adapters), **sections))
    spool = Spool(folder)
    return {
        e.name: Collector(
            experiment=e,
            algo=e.algo,  # type: ignore[arg-type]  # of a run that samples
            source=Numbers(),
            env=OneTurn(script, e.name),
            policy=Policy(
                ref=None, sampling=SamplingParams(), stream=e.name, decode=lambda tokens: ""
            ),
            admission=Admission(
                batch_size=e.algo.batch_size,
                max_staleness=e.rollout.max_head_offpolicyness,
                max_concurrent=e.max_concurrent,
                version=0,
                accepted=0,
            ),
            engine=script,  # type: ignore[arg-type]  # it only generates
            spool=spool,
        )
        for e in config.experiments()
    }


def make(folder: Path, script: Script, **sections: Any) -> Collector:
    return make_all(folder, script, {"a": {}}, **sections)["a"]


def run(body: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(body, 20))


def version(name: str, number: int) -> AdapterRef:
    return AdapterRef(name=name, version=number, run_id="run", digest="0" * 64)


def train(collector: Collector) -> None:
    """As after a step on what was given out."""
    collector.trained()
    collector.admit(version(collector.name, collector.admission.version + 1))


def done(collector: Collector) -> bool:
    return collector.admission.version >= collector.experiment.steps


async def finish(collector: Collector) -> list[list[Group]]:
    """Every batch, each taken for trained on at once."""
    batches: list[list[Group]] = []
    while not done(collector):
        batches.append(await collector.batch())
        train(collector)
    await collector.close()
    return batches


def taken(batches: list[list[Group]]) -> list[list[int]]:
    return [[group.index for group in batch] for batch in batches]


def test_a_synchronous_run_takes_the_prompts_in_order(tmp_path: Path) -> None:
    script = Script()
    batches = run(finish(make(tmp_path, script)))
    assert taken(batches) == [[0, 1], [2, 3], [4, 5]]
    versions = [group.min_version for batch in batches for group in batch]
    assert versions == [0, 0, 1, 1, 2, 2]
    assert list(tmp_path.rglob("*")) == [], "a synchronous run has nothing to keep"


def test_an_adapter_that_has_its_batch_never_waits_for_another(tmp_path: Path) -> None:
    async def body() -> None:
        script, go = Script(), asyncio.Event()

        async def wait(adapter: str, *_: int) -> None:
            if adapter == "slow":
                await go.wait()

        script.wait = wait
        both = make_all(tmp_path, script, {"slow": {}, "fast": {}})
        slow = asyncio.create_task(finish(both["slow"]))
        assert len(await finish(both["fast"])) == 3
        assert both["slow"].running == {0, 1}
        go.set()
        assert len(await slow) == 3

    run(body())


def test_it_goes_on_collecting_until_its_batch_is_complete_while_others_are_trained(
    tmp_path: Path,
) -> None:
    async def body() -> None:
        script = Script()
        # prompts 0 to 3 of b fail, so that its batch needs four others
        script.reward = lambda name, index, sample: (
            None if name == "b" and index < 4 else float(sample)
        )

        async def wait(name: str, *_: int) -> None:
            await asyncio.sleep(0.001 if name == "b" else 0)

        script.wait = wait
        both = make_all(tmp_path, script, {"a": {}, "b": {}})
        waiting = asyncio.create_task(both["b"].batch())
        await both["a"].batch()
        assert not waiting.done()
        waiting.cancel()  # as when nobody asks: groups start without a call
        await asyncio.sleep(0.1)  # training a
        assert len(both["b"].finished) == 2
        for collector in both.values():
            await collector.close()

    run(body())


def test_a_failed_rollout_is_recorded_and_its_siblings_are_kept(tmp_path: Path) -> None:
    script = Script()
    script.fail = lambda _, index, sample: (
        ValueError("the prompt is too long") if (index, sample) == (1, 2) else None
    )
    script.reward = lambda _, index, sample: None if (index, sample) == (0, 3) else float(sample)
    collector = make(tmp_path, script)
    first = run(finish(collector))[0]
    assert [r.reward for r in first[0].rollouts] == [0.0, 1.0, 2.0, None]
    assert first[0].rollouts[3].error == "timeout: the reward took too long"
    assert [r.reward for r in first[1].rollouts] == [0.0, 1.0, None, 3.0]
    assert first[1].rollouts[2].error == "environment raised ValueError: the prompt is too long"
    assert collector.errors == {"timeout": 1, "environment raised ValueError": 1}


def test_a_group_with_fewer_than_two_rewards_gives_way_to_the_next_prompt(tmp_path: Path) -> None:
    script = Script()
    script.reward = lambda _, index, sample: float(sample) if index != 1 or sample == 0 else None
    assert taken(run(finish(make(tmp_path, script)))) == [[0, 2], [3, 4], [5, 6]]


def test_without_statistics_of_groups_one_sample_of_a_prompt_is_enough(tmp_path: Path) -> None:
    algo = {"adv_norm": {"mean_level": "batch", "std_level": "batch"}}
    collector = make(tmp_path, Script(), algo=algo, rollout={"n_samples": 1})
    assert taken(run(finish(collector))) == [[0, 1], [2, 3], [4, 5]]
    script = Script()
    script.reward = lambda _, index, sample: float(sample) if index != 1 or sample == 0 else None
    four = make(tmp_path / "four", script, algo=algo)
    assert taken(run(finish(four))) == [[0, 1], [2, 3], [4, 5]]


def test_groups_that_failed_in_part_are_counted_whether_they_are_kept_or_not(
    tmp_path: Path,
) -> None:
    script = Script()
    # all of group 0 fail, three of group 1, one of group 2
    script.reward = lambda _, index, sample: (
        None if index == 0 or (index == 1 and sample) or (index == 2 and not sample) else 1.0
    )
    collector = make(tmp_path, script)
    assert taken(run(finish(collector)))[0] == [2, 3]
    assert collector.partly_failed == 2


class WholeGroups:
    """A reward of whole groups, and the environment that asks it: the longest text has 1."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    async def run(self, prompt: Prompt, sample: Sampler) -> Episode:
        turn = await sample(prompt.tokens)
        member = current_member()
        assert member is not None
        text = str(int(turn.completion.tokens[0]))
        result = await member.score(RewardSample(data={}, completion=text), self.score_all)
        return Episode(turns=(turn,), reward=result.value)

    async def score_all(self, samples: Sequence[RewardSample]) -> list[RewardResult]:
        texts = [one.completion for one in samples]
        self.calls.append(texts)
        return [RewardResult(value=float(text == max(texts))) for text in texts]


def test_a_reward_of_whole_groups_is_asked_once_a_group_with_those_that_live(
    tmp_path: Path,
) -> None:
    script = Script()
    rng = random.Random(3)

    async def wait(*_: object) -> None:
        await asyncio.sleep(rng.random() / 100)

    script.wait = wait
    script.fail = lambda _, index, sample: ValueError() if (index, sample) == (1, 3) else None
    collector = make(tmp_path, script)
    env = WholeGroups()
    collector.env = env
    first = run(finish(collector))[0]
    assert [[r.reward for r in g.rollouts] for g in first] == [[0, 0, 0, 1], [0, 0, 1, None]]
    assert sorted(env.calls)[0] == ["1", "2", "3"]
    assert sorted(env.calls)[1:] == [["1", "2", "3", "4"]] * 5


def test_an_algorithm_may_have_the_reward_of_the_greedy_answer_beside_its_samples(
    tmp_path: Path,
) -> None:
    class Greedy(Grpo):
        greedy_baseline = True

    class Engine(Script):
        async def generate(self, request: GenerateRequest) -> Completion:
            if request.sampling.temperature:
                return await super().generate(request)
            sampled = replace(request, key=request.key.replace("greedy", "6"))
            if int(request.tokens[0]) == 1:
                raise ValueError("no answer")
            return await super().generate(sampled)

    collector = make(tmp_path, Engine())
    collector.algo = Greedy(batch_size=2)
    first = run(finish(collector))[0]
    assert [group.index for group in first] == [0, 2]
    for group in first:
        assert [r.reward for r in group.rollouts] == [0, 1, 2, 3]
        assert [r.baseline for r in group.rollouts] == [6] * 4
    assert collector.errors["greedy answer"] == 4


@pytest.mark.parametrize(("drop", "first"), [(True, [1, 2]), (False, [0, 1])])
def test_a_group_with_equal_rewards_gives_way_only_when_asked(
    tmp_path: Path, drop: bool, first: list[int]
) -> None:
    script = Script()
    script.reward = lambda _, index, sample: 0.5 if index == 0 else float(sample)
    algo = {"drop_zero_variance_groups": drop}
    assert taken(run(finish(make(tmp_path, script, algo=algo))))[0] == first


@pytest.mark.parametrize(
    ("most", "expected", "dropped"),
    # every third group has rewards that differ: 2, 5, 8, ...
    [
        (0, [[0, 1], [2, 3], [4, 5]], [0, 0, 0]),
        (1, [[0, 2], [3, 5], [6, 8]], [1, 1, 1]),
        (9, [[2, 5], [8, 11], [14, 17]], [4, 4, 4]),
    ],
)
def test_a_batch_drops_so_many_groups_of_equal_rewards_and_trains_on_the_others(
    tmp_path: Path, most: int, expected: list[list[int]], dropped: list[int]
) -> None:
    algo = {"batch_size": 2, "drop_zero_variance_groups": True, "max_dropped_groups": most}

    async def body(seed: int) -> tuple[list[list[int]], list[int]]:
        rng, script = random.Random(seed), Script()

        async def wait(*_: object) -> None:
            await asyncio.sleep(rng.random() / 1000)

        script.wait = wait
        script.reward = lambda _, index, sample: float(sample) if index % 3 == 2 else 0.0
        collector = make(tmp_path / f"{most}", script, algo=algo, steps=3)
        batches: list[list[int]] = []
        counts: list[int] = []
        while not done(collector):
            batches.append([group.index for group in await collector.batch()])
            assert [why for why, _ in collector.dropped] == ["flat"] * len(collector.dropped)
            counts.append(len(collector.dropped))
            collector.dropped.clear()
            assert collector.pending() == batches[-1]
            train(collector)
        await collector.close()
        return batches, counts

    # whoever finishes first
    assert run(body(1)) == run(body(2)) == (expected, dropped)


def test_the_batch_of_a_synchronous_run_does_not_depend_on_who_is_first(tmp_path: Path) -> None:
    def batches(seed: int) -> list[list[int]]:
        rng, script = random.Random(seed), Script()

        async def wait(*_: object) -> None:
            await asyncio.sleep(rng.random() / 1000)

        script.wait = wait
        script.reward = lambda _, index, sample: None if index % 3 == 0 else float(sample)
        return taken(run(finish(make(tmp_path, script, algo={"batch_size": 4}))))

    assert batches(1) == batches(2) == [[1, 2, 4, 5], [7, 8, 10, 11], [13, 14, 16, 17]]


def test_of_many_finished_groups_the_first_started_are_taken(tmp_path: Path) -> None:
    async def body() -> None:
        many = make(tmp_path, Script(), algo={"batch_size": 4})
        groups = await many.batch()
        collector = make(tmp_path, Script(), rollout={"max_head_offpolicyness": 1})
        collector.finished, collector.admission.accepted = groups[::-1], 4
        assert [group.index for group in await collector.batch()] == [0, 1]
        assert [group.index for group in collector.finished] == [2, 3]
        await many.close()
        await collector.close()

    run(body())


def test_a_group_that_ends_after_its_bound_is_dropped(tmp_path: Path) -> None:
    async def body() -> None:
        script, late = Script(), asyncio.Event()

        async def wait(_: str, index: int, sample: int) -> None:
            await (late.wait() if index == 0 else asyncio.sleep(0))

        script.wait = wait
        collector = make(tmp_path, script, rollout={"max_head_offpolicyness": 1}, steps=6)
        seen: list[int] = []
        while not done(collector):
            seen += [group.index for group in await collector.batch()]
            train(collector)
            if collector.admission.version == 2:
                late.set()  # sampled by version 0: two versions ago
        await collector.close()
        assert 0 not in seen and len(seen) == len(set(seen)) == 12
        assert collector.errors["stale"] >= 1, "others too, when the spool is slow"

    run(body())


def test_a_finished_group_that_grows_stale_while_it_waits_is_dropped(tmp_path: Path) -> None:
    async def body() -> None:
        script = Script()
        collector = make(tmp_path, script, rollout={"max_head_offpolicyness": 1}, steps=6)
        training = {group.index for group in await collector.batch()}
        await asyncio.sleep(0.05)
        waiting = {group.index for group in collector.finished}
        assert waiting and Spool(tmp_path).read("a").keys() == training | waiting
        collector.trained()
        collector.admit(version("a", 2))
        assert collector.finished == [] and collector.errors["stale"] == len(waiting)
        assert Spool(tmp_path).read("a").keys() == training
        await collector.close()

    run(body())


def test_what_was_trained_on_stays_in_the_spool_until_a_checkpoint_holds_it(
    tmp_path: Path,
) -> None:
    async def body() -> None:
        collector = make(tmp_path, Script(), rollout={"max_head_offpolicyness": 1}, steps=6)
        trained: set[int] = set()
        for _ in range(2):  # two steps without a checkpoint
            trained |= {group.index for group in await collector.batch()}
            train(collector)
            assert not trained & set(collector.pending())
            assert trained <= Spool(tmp_path).read("a").keys()
        given = {group.index for group in await collector.batch()}
        collector.forget_trained()
        assert not trained & Spool(tmp_path).read("a").keys()
        assert given <= Spool(tmp_path).read("a").keys(), "it is not trained on yet"
        assert given <= set(collector.pending())
        await collector.close()

    run(body())


@pytest.mark.parametrize("seed", range(10))
def test_what_is_trained_on_is_never_staler_than_the_bound(tmp_path: Path, seed: int) -> None:
    async def body() -> None:
        rng, script = random.Random(seed), Script()
        eta, concurrent = rng.choice([0, 1, 2, 3]), rng.choice([None, 1, 3])

        async def wait(*_: object) -> None:
            for _ in range(int(rng.paretovariate(0.7)) % 200):  # now and then one takes very long
                await asyncio.sleep(0)

        script.wait = wait
        script.fail = lambda *_: ValueError("no") if rng.random() < 0.3 else None
        limits = {"max_head_offpolicyness": eta, "max_concurrent": concurrent, "n_samples": 3}
        adapters = {"a": {}, "b": {"algo": {"batch_size": 3}, "steps": 5}}
        training = asyncio.Lock()  # one engine

        async def used(collector: Collector) -> list[int]:
            indices: list[int] = []
            while not done(collector):
                groups = await collector.batch()
                admission = collector.admission
                assert len(groups) == collector.algo.batch_size
                assert admission.running <= collector.experiment.max_concurrent
                indices += [group.index for group in groups]
                async with training:
                    for _ in range(rng.randint(0, 100)):
                        await asyncio.sleep(0)
                assert all(admission.version - g.min_version <= eta for g in groups)
                train(collector)
            return indices

        both = make_all(tmp_path, script, adapters, rollout=limits, steps=8)
        found = await asyncio.gather(*map(used, both.values()))
        assert [len(indices) for indices in found] == [16, 15]
        assert all(len(set(indices)) == len(indices) for indices in found)
        for collector in both.values():
            admission = collector.admission
            assert (admission.running, collector.running, collector.finished) == (0, set(), [])
            await collector.close()

    run(body())


def test_no_group_is_started_that_the_steps_left_cannot_use(tmp_path: Path) -> None:
    script = Script()
    run(finish(make(tmp_path, script, rollout={"max_head_offpolicyness": 4})))
    assert script.indices("a") == [0, 1, 2, 3, 4, 5]


def test_a_dead_engine_ends_the_run(tmp_path: Path) -> None:
    script = Script()
    script.fail = lambda _, index, sample: (
        EngineClosed("the decode thread failed: out of memory") if index == 3 else None
    )
    with pytest.raises(EngineClosed, match="out of memory"):
        run(finish(make(tmp_path, script)))


def test_a_hopeless_task_ends_the_job_with_the_last_reason(tmp_path: Path) -> None:
    script = Script()
    script.reward = lambda *_: None
    with pytest.raises(RolloutsFail) as caught:
        run(finish(make(tmp_path, script)))
    assert "adapter a: 64 groups in a row gave nothing to train on" in str(caught.value)
    assert "timeout: the reward took too long" in str(caught.value)
    assert isinstance(caught.value, ValueError), "one line for the user"
    assert len(script.indices("a")) <= MAX_CONSECUTIVE_FAILED_GROUPS + 2, "those in flight"


def test_a_failure_now_and_then_is_not_hopeless(tmp_path: Path) -> None:
    script = Script()
    script.reward = lambda _, index, sample: float(sample) if index % 50 == 0 else None
    batches = run(finish(make(tmp_path, script)))
    assert taken(batches) == [[0, 50], [100, 150], [200, 250]]


def test_a_prompt_that_cannot_be_made_ends_the_job(tmp_path: Path) -> None:
    class Broken(Numbers):
        def prompt(self, index: int) -> Prompt:
            if index == 2:
                raise ValueError("task.max_prompt_tokens: the prompt of 2 has 9 tokens")
            return super().prompt(index)

    collector = make(tmp_path, Script())
    collector.source = Broken()
    with pytest.raises(ValueError, match="max_prompt_tokens"):
        run(finish(collector))


def test_what_a_crash_left_undone_comes_before_new_prompts(tmp_path: Path) -> None:
    collector = make(tmp_path, Script())
    collector.restore(version=0, next_index=6, pending=[1, 3, 4])
    assert collector.pending() == [1, 3, 4]
    assert taken(run(finish(collector))) == [[1, 3], [4, 6], [7, 8]]


@pytest.mark.parametrize(
    ("spooled", "committed", "next_index", "pending", "kept", "redo"),
    [
        ([2, 3, 4, 5], 2, 6, [4, 5], [4, 5], []),
        ([2, 3, 4, 5], 2, 4, [1, 3], [3, 4, 5], [1]),  # 4, 5: started after the checkpoint
        ([2, 3, 4, 5], 1, 4, [2, 3], [2, 3], []),  # 4, 5: of version 2, which was rolled back
        ([4, 5], 2, 3, [], [4, 5], [3]),
    ],
)
def test_what_a_crash_left_finished_is_kept_where_it_is_owed(
    tmp_path: Path,
    spooled: list[int],
    committed: int,
    next_index: int,
    pending: list[int],
    kept: list[int],
    redo: list[int],
) -> None:
    async def body() -> None:
        groups = [group for batch in await finish(make(tmp_path, Script())) for group in batch]
        spool = Spool(tmp_path)
        for index in spooled:
            spool.put(groups[index])  # groups 2n and 2n + 1 are of version n
        collector = make(tmp_path, Script(), rollout={"max_head_offpolicyness": 2}, steps=9)
        collector.restore(version=committed, next_index=next_index, pending=pending)
        assert [group.index for group in collector.finished] == kept == list(spool.read("a"))
        assert collector.redo == redo
        assert collector.next_index == max(next_index, kept[-1] + 1)
        assert collector.pending() == sorted(kept + redo)
        admission = collector.admission
        assert (admission.version, admission.accepted) == (committed, 2 * committed + len(kept))

    run(body())


def test_pending_names_all_that_was_started_and_not_trained_on(tmp_path: Path) -> None:
    async def body() -> None:
        script, never = Script(), asyncio.Event()

        async def wait(_: str, index: int, sample: int) -> None:
            await (never.wait() if index in (1, 4) else asyncio.sleep(0))

        script.wait = wait
        collector = make(tmp_path, script, rollout={"max_head_offpolicyness": 2})
        first = await collector.batch()
        await asyncio.sleep(0.05)
        assert collector.pending() == list(range(collector.next_index)), "given out, not trained"
        collector.trained()
        trained = [group.index for group in first]
        left = [i for i in range(collector.next_index) if i not in trained]
        assert collector.pending() == left
        assert collector.running == {1, 4}
        await collector.close()
        assert collector.pending() == left

    run(body())


def test_close_starts_no_further_group(tmp_path: Path) -> None:
    async def body() -> None:
        script = Script()
        collector = make(tmp_path, script, rollout={"max_head_offpolicyness": 2}, steps=9)
        await collector.batch()
        await collector.close()
        before = len(script.started)
        train(collector)
        await asyncio.sleep(0.05)
        assert len(script.started) == before

    run(body())


def test_close_does_not_wait_for_rollouts_in_flight(tmp_path: Path) -> None:
    async def body() -> None:
        script = Script()

        async def wait(*_: object) -> None:
            await asyncio.Event().wait()

        script.wait = wait
        collector = make(tmp_path, script)
        waiting = asyncio.create_task(collector.batch())
        await asyncio.sleep(0.05)
        await collector.close()
        assert collector.pending() == [0, 1]
        waiting.cancel()

    run(body())
