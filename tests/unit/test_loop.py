"""The loop, with every part real: what a step commits, and what a failure leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from lorelei import loop as the_loop
from lorelei.jobs.driven import DrivenJob
from lorelei.loop import Loop
from lorelei.lora.state import AdapterState
from lorelei.publish.contract import PublishError
from lorelei.publish.publisher import VersionPublisher
from lorelei.rollout.collector import RolloutsFail
from lorelei.store.check import check_run
from lorelei.store.index import list_runs
from lorelei.store.manifest import manifest_paths
from lorelei.store.spool import Spool
from lorelei.train.work import Work
from lorelei.types import AdapterRef
from tests.loops import before_training, digest, open_loop, rl, versions, whole
from tests.tiny_runs import make_workplace, records, write_run

TOKENS = np.arange(3, 20, dtype=np.int32)


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    return make_workplace(tmp_path_factory.mktemp("place"), tiny_tokenizer)


def loop_of(folder: Path, place: Path, **sections: object) -> AbstractAsyncContextManager[Loop]:
    """The loop of a new run, or of one that goes on."""
    return open_loop(write_run(place, "run", **sections), folder)


def test_a_run_commits_every_step_whole(tmp_path: Path, place: Path) -> None:
    async def body() -> None:
        async with loop_of(tmp_path / "run", place) as loop:
            await whole(loop)
            latest = loop.store.latest
            assert latest is not None and latest.step == 3
            entry = latest.adapters["default"]
            assert (entry.record.version, entry.record.optimizer_step) == (3, 3)
            state = entry.record.state
            assert (state["next_index"], state["pending"]) == (6, [])
            assert entry.ref is not None and entry.ref.digest == digest(loop)
            assert loop.store.load("default").state.digest() == digest(loop)

    asyncio.run(body())
    assert [path.stem for path in manifest_paths(tmp_path / "run")] == ["000002", "000003"]
    assert check_run(tmp_path / "run") == []


def test_the_listing_shows_the_reward_and_the_score_of_the_last_step(
    tmp_path: Path, place: Path
) -> None:
    async def body() -> None:
        async with loop_of(tmp_path / "run", place) as loop:
            await whole(loop)

    asyncio.run(body())
    (summary,) = list_runs(tmp_path)
    assert (summary.steps, summary.status) == (3, "finished")
    last = records(tmp_path / "run", "eval")[-1]
    assert last["step"] == 3 and summary.score == last["scores"]["reward"]
    assert summary.reward == records(tmp_path / "run", "step")[-1]["reward"]


def test_every_rollout_of_a_step_is_logged_with_what_it_was_sampled_from(
    tmp_path: Path, place: Path
) -> None:
    async def body() -> None:
        async with loop_of(tmp_path / "run", place) as loop:
            await whole(loop)

    asyncio.run(body())
    lines = (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()
    rollouts = [json.loads(line) for line in lines]
    assert [r["step"] for r in rollouts] == [1] * 8 + [2] * 8 + [3] * 8
    assert all(r["version"] == r["step"] - 1 for r in rollouts)
    assert [r["sample"] for r in rollouts[:8]] == [0, 1, 2, 3] * 2
    for step in records(tmp_path / "run", "step"):
        mine = [r["reward"] for r in rollouts if r["step"] == step["step"]]
        assert step["reward"] == pytest.approx(sum(mine) / len(mine), abs=1e-12)
        phases = {name: s for name, s in step["seconds"].items() if name != "step"}
        assert sum(phases.values()) == pytest.approx(step["seconds"]["step"], abs=0.01)


def test_replaced_versions_are_retired(tmp_path: Path, place: Path) -> None:
    async def body() -> None:
        async with loop_of(tmp_path / "run", place, adapters={"a": {}, "b": {"steps": 2}}) as loop:
            await whole(loop)
            served = (await rl(loop, "a").collector.engine.health()).adapters
            assert [name.rpartition("-")[0].split("-")[:2] for name in served] == [
                ["a", "v3"],
                ["b", "v2"],
            ]

    asyncio.run(body())


def test_an_adapter_that_has_its_steps_stays_as_it_is(tmp_path: Path, place: Path) -> None:
    async def body() -> None:
        adapters = {"short": {"steps": 1}, "long": {"steps": 4}}
        async with loop_of(tmp_path / "run", place, adapters=adapters) as loop:
            await the_loop.begin(loop)
            seen: dict[int, str] = {}

            def look(works: Sequence[Work]) -> None:
                seen.setdefault(loop.registry["short"].version, digest(loop, "short"))

            before_training(loop, look)
            await the_loop.run(loop)
            assert digest(loop, "short") == seen[1] != seen[0]
            assert versions(loop) == {"short": 1, "long": 4}

    asyncio.run(body())


def test_a_stop_between_two_checkpoints_saves_the_step(tmp_path: Path, place: Path) -> None:
    async def body() -> None:
        async with loop_of(tmp_path / "run", place, checkpoint={"every": 10}) as loop:
            await the_loop.begin(loop)
            loop.registry.stop()
            await the_loop.run(loop)
            assert loop.store.latest is not None and loop.store.latest.step == 0
        async with loop_of(tmp_path / "run", place, checkpoint={"every": 10}) as loop:
            await the_loop.begin(loop)
            before_training(loop, lambda works: loop.registry.stop())
            await the_loop.run(loop)
            assert loop.store.latest is not None and loop.store.latest.step == 1
            assert loop.store.load("default").state.digest() == digest(loop)
            ref = loop.store.latest.adapters["default"].ref
            assert ref is not None and ref.digest == digest(loop), "what the engine was given"

    asyncio.run(body())


class Unlucky(VersionPublisher):
    """Cannot publish one of the versions."""

    bad: int = 2

    async def publish(
        self, versions: Mapping[str, int], states: Mapping[str, AdapterState]
    ) -> dict[str, AdapterRef]:
        if self.bad in versions.values():
            raise PublishError("the engine installed another digest")
        return await super().publish(versions, states)


def test_a_step_whose_version_cannot_be_published_did_not_happen(
    tmp_path: Path, place: Path
) -> None:
    async def body() -> None:
        async with loop_of(tmp_path / "whole", place) as loop:
            expected = digest(await whole(loop))
        async with loop_of(tmp_path / "run", place) as loop:
            loop.publisher = Unlucky(rl(loop).collector.engine, loop.store.run_id)
            with pytest.raises(PublishError):
                await whole(loop)
            assert loop.store.latest is not None and loop.store.latest.step == 1
        async with loop_of(tmp_path / "run", place) as loop:
            assert versions(loop) == {"default": 1}
            assert digest(await whole(loop)) == expected

    asyncio.run(body())
    assert check_run(tmp_path / "run") == []


def test_a_step_is_shown_once_it_is_committed(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[int, int]] = []

    async def body() -> None:
        async with loop_of(tmp_path / "run", place) as loop:

            def step(record: Mapping[str, object]) -> None:
                assert loop.store.latest is not None
                shown.append((int(str(record["step"])), loop.store.latest.step))

            monkeypatch.setattr(loop.console, "step", step)
            await whole(loop)

    asyncio.run(body())
    assert shown == [(1, 1), (2, 2), (3, 3)]


def test_a_resumed_run_remembers_its_scores(tmp_path: Path, place: Path) -> None:
    async def body() -> None:
        sections = {"eval": {"every": 9}, "steps": 4}
        async with loop_of(tmp_path / "run", place, **sections) as loop:
            loop.publisher = Unlucky(rl(loop).collector.engine, loop.store.run_id)
            with pytest.raises(PublishError):
                await whole(loop)
            before = rl(loop).state()
        async with loop_of(tmp_path / "run", place, **sections) as loop:
            after = rl(loop).state()
            assert None not in (after["score"], after["reward"]), "of step 1, the last committed"
            assert (after["score"], after["reward"]) == (before["score"], before["reward"])

    asyncio.run(body())


def test_a_run_of_which_no_problem_can_be_scored_does_not_begin(
    tmp_path: Path, place: Path
) -> None:
    (place / "raises.py").write_text("def score(completion): return 1 / 0")

    async def body() -> None:
        reward = {"path": "raises.py:score", "trial": False}
        async with loop_of(tmp_path / "run", place, reward=reward) as loop:
            with pytest.raises(RolloutsFail, match=r"none of 4 .* raised ZeroDivisionError"):
                await the_loop.begin(loop)
            assert loop.store.latest is None
            loop.store.discard()

    asyncio.run(body())
    assert list(tmp_path.iterdir()) == []


def test_evaluation_happens_when_it_is_due_and_at_the_end(tmp_path: Path, place: Path) -> None:
    async def body() -> None:
        adapters = {"a": {"steps": 3}, "b": {"eval": {"every": 0}}, "c": {"eval": {"every": 1}}}
        async with loop_of(tmp_path / "run", place, adapters=adapters, steps=2) as loop:
            await whole(loop)

    asyncio.run(body())
    found = sorted((r["adapter"], r["step"]) for r in records(tmp_path / "run", "eval"))
    assert found == [("a", 0), ("a", 2), ("a", 3), ("c", 0), ("c", 1), ("c", 2)]


def test_a_job_that_fails_leaves_the_others_to_finish_and_the_run_ends_with_its_error(
    tmp_path: Path, place: Path
) -> None:
    (place / "fails.py").write_text("def score(completion): return 1 / 0")
    bad = {"reward": {"path": "fails.py:score", "trial": False}, "eval": {"every": 0}}

    async def body() -> None:
        async with loop_of(tmp_path / "run", place, adapters={"bad": bad, "good": {}}) as loop:
            with pytest.raises(RolloutsFail, match="adapter bad: 64 groups in a row"):
                await whole(loop)
            assert versions(loop) == {"bad": 0, "good": 3}
            assert list(loop.registry.failed) == ["bad"]
            latest = loop.store.latest
            assert latest is not None and latest.state["finished"] is False
            stand = {name: entry.record.version for name, entry in latest.adapters.items()}
            assert stand == {"bad": 0, "good": 3}
            assert loop.store.load("good").state.digest() == digest(loop, "good")
        async with loop_of(
            tmp_path / "run", place, adapters={"bad": {"eval": {"every": 0}}, "good": {}}
        ) as loop:
            await whole(loop)
            assert versions(loop) == {"bad": 3, "good": 3}

    asyncio.run(body())
    assert check_run(tmp_path / "run") == []


def test_what_was_trained_on_between_two_checkpoints_is_kept_for_a_crash(
    tmp_path: Path, place: Path
) -> None:
    sections = {
        "checkpoint": {"every": 3},
        "steps": 6,
        "rollout": {"max_head_offpolicyness": 1},
        "eval": {"every": 0},
    }
    trained: list[int] = []

    async def body() -> None:
        async with loop_of(tmp_path / "run", place, **sections) as loop:

            def look(works: Sequence[Work]) -> None:
                spooled = set(Spool(loop.store.folder).read("default"))
                assert set(trained) <= spooled, "no checkpoint has these steps"
                trained.extend(group.index for group in rl(loop).collector.taken)
                if loop.step == 2:
                    raise PublishError("as if it had been killed")

            before_training(loop, look)
            with pytest.raises(PublishError):
                await whole(loop)
            assert loop.store.latest is not None and loop.store.latest.step == 0
        async with loop_of(tmp_path / "run", place, **sections) as loop:
            collector = rl(loop).collector
            assert {group.index for group in collector.finished} == {0, 1, 2, 3}
            assert all(group.newest_version == 0 for group in collector.finished), "a committed one"
            assert loop.step == 0 and collector.next_index == max(collector.pending()) + 1
            await whole(loop)
            assert Spool(loop.store.folder).read("default") == {}

    asyncio.run(body())
    assert trained == [0, 1, 2, 3, 4, 5]
    lines = (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()
    seen = [(r["prompt_id"], r["sample"]) for r in map(json.loads, lines)]
    assert len(seen) == len(set(seen)) == 6 * 2 * 4, "none is trained on twice"


class Slow(VersionPublisher):
    """Takes its time to forget a version, as servers do whose requests have to drain."""

    async def retire(self, ref: AdapterRef) -> None:
        await asyncio.sleep(0.2)
        await super().retire(ref)


def test_an_adapter_that_is_removed_can_be_added_again_from_the_start(
    tmp_path: Path, place: Path
) -> None:
    async def body() -> None:
        async with loop_of(tmp_path / "run", place, adapters={"a": {}, "b": {}}) as loop:
            fresh, engine = digest(loop, "a"), rl(loop, "a").collector.engine
            loop.publisher = Slow(engine, loop.store.run_id)
            await the_loop.begin(loop)
            for _ in range(3):
                old = loop.registry["a"]
                await the_loop.remove(loop, "a")
                # the same tensors, and so the same name of its version, as before
                again = DrivenJob("a", old.spec, old.seed)
                await the_loop.add(loop, again)
                assert digest(loop, "a") == fresh and again.ref is not None
                await asyncio.gather(*loop.retiring)
                (score,) = await engine.score([TOKENS], again.ref)
                assert len(score) == len(TOKENS) - 1
            with pytest.raises(ValueError, match="adapter 'a' has a job already"):
                await the_loop.add(loop, DrivenJob("a", old.spec))
            await the_loop.remove(loop, "a")
            await the_loop.run(loop)
            assert versions(loop) == {"b": 3}
            served = (await engine.health()).adapters
            assert [name.split("-")[:2] for name in served] == [["b", "v3"]]

    asyncio.run(body())
    assert check_run(tmp_path / "run") == []
