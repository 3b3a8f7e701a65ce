"""The loop, with every part real: what a step commits, and what a failure leaves."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from lorelei import loop as the_loop
from lorelei.launch.assemble import build, make_loop, make_trainer
from lorelei.loop import Loop
from lorelei.lora.state import AdapterState
from lorelei.obs.console import Console
from lorelei.publish.contract import PublishError
from lorelei.publish.publisher import VersionPublisher
from lorelei.rollout.collector import RolloutsFail
from lorelei.run_file import load_config, to_plain
from lorelei.store.check import check_run
from lorelei.store.index import list_runs
from lorelei.store.manifest import manifest_paths
from lorelei.store.run import RunStore
from lorelei.types import AdapterRef
from tests.tiny_runs import make_workplace, records, write_run


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    return make_workplace(tmp_path_factory.mktemp("place"), tiny_tokenizer)


@asynccontextmanager
async def loop_of(folder: Path, place: Path, **sections: object) -> AsyncIterator[Loop]:
    """The loop of a new run, or of one that goes on."""
    config = load_config(write_run(place, "run", **sections))
    async with AsyncExitStack() as stack:
        if (folder / "run.json").exists():
            store = RunStore.open(folder)
        else:
            store = RunStore.create(folder, to_plain(config))
        stack.callback(store.close)
        parts = await build(config, stack)
        trainer = make_trainer(config, parts, stack)
        for name in store.latest.adapters if store.latest else ():
            trainer.engine.restore(name, store.load(name))
        console = Console({e.name: e.steps for e in config.experiments()}, io.StringIO())
        loop = make_loop(config, parts, trainer, store, console)
        stack.push_async_callback(loop.collector.close)
        yield loop


async def whole(loop: Loop) -> Loop:
    await the_loop.begin(loop)
    await the_loop.run(loop)
    return loop


def digest(loop: Loop, name: str = "default") -> str:
    return loop.trainer.engine.adapter_state(name).digest()


def test_a_run_commits_every_step_whole(tmp_path: Path, place: Path) -> None:
    async def body() -> None:
        async with loop_of(tmp_path / "run", place) as loop:
            await whole(loop)
            latest = loop.store.latest
            assert latest is not None and latest.step == 3
            entry = latest.adapters["default"]
            assert (entry.record.version, entry.record.optimizer_step) == (3, 3)
            assert (entry.record.data_position, entry.record.admission) == (6, {"pending": []})
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
            engine = next(iter(loop.evaluators.values())).engine
            served = (await engine.health()).adapters
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
            real = loop.trainer.step

            async def step(batch, versions):  # type: ignore[no-untyped-def]
                seen.setdefault(versions["short"], digest(loop, "short"))
                return await real(batch, versions)

            loop.trainer.step = step  # type: ignore[method-assign]
            await the_loop.run(loop)
            assert digest(loop, "short") == seen[1] != seen[0]
            assert loop.versions == {"short": 1, "long": 4}

    asyncio.run(body())


def test_a_stop_between_two_checkpoints_saves_the_step(tmp_path: Path, place: Path) -> None:
    async def body() -> None:
        async with loop_of(tmp_path / "run", place, checkpoint={"every": 10}) as loop:
            await the_loop.begin(loop)
            loop.collector.stop()
            await the_loop.run(loop)
            assert loop.store.latest is not None and loop.store.latest.step == 0
        async with loop_of(tmp_path / "run", place, checkpoint={"every": 10}) as loop:
            await the_loop.begin(loop)
            real = loop.trainer.step

            async def step(batch, versions):  # type: ignore[no-untyped-def]
                loop.collector.stop()
                return await real(batch, versions)

            loop.trainer.step = step  # type: ignore[method-assign]
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
            engine = loop.evaluators["default"].engine
            loop.publisher = Unlucky(engine, loop.store.run_id)
            with pytest.raises(PublishError):
                await whole(loop)
            assert loop.store.latest is not None and loop.store.latest.step == 1
        async with loop_of(tmp_path / "run", place) as loop:
            assert loop.versions == {"default": 1}
            assert digest(await whole(loop)) == expected

    asyncio.run(body())
    assert check_run(tmp_path / "run") == []


def test_a_resumed_run_remembers_its_scores(tmp_path: Path, place: Path) -> None:
    async def body() -> None:
        sections = {"eval": {"every": 9}, "steps": 4}
        async with loop_of(tmp_path / "run", place, **sections) as loop:
            loop.publisher = Unlucky(loop.evaluators["default"].engine, loop.store.run_id)
            with pytest.raises(PublishError):
                await whole(loop)
            before = dict(loop.scores)
        async with loop_of(tmp_path / "run", place, **sections) as loop:
            assert before and loop.scores == before and loop.reward is not None

    asyncio.run(body())


def test_a_run_of_which_no_problem_can_be_scored_does_not_begin(
    tmp_path: Path, place: Path
) -> None:
    (place / "raises.py").write_text("def score(completion): return 1 / 0")

    async def body() -> None:
        reward = {"path": "raises.py:score"}
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
