"""kill -9 at any moment loses nothing: the run resumes and ends as if nothing had been."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from lorelei.cli.trained_run import TrainedRun
from lorelei.data.source import make_source
from lorelei.model.tokenizer import load_tokenizer
from lorelei.store.check import check_run
from lorelei.store.manifest import manifest_paths
from tests.fork_server import ForkServer
from tests.tiny_runs import final, make_workplace, records, write_run

pytestmark = pytest.mark.slow
KILLS = 10
STEPS = 90  # some seconds
ASYNC_STEPS = 30  # of 2 prompts: fewer than there are rows


class Lorelei:
    """Runs commands in a workplace, and kills them."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._server = ForkServer()

    def run(
        self,
        *arguments: str,
        until: Callable[[], bool] = lambda: False,
        send: int = signal.SIGKILL,
        to: Callable[[int], int] = lambda pid: pid,
    ) -> int:
        """The exit code; minus the signal for a command that died of `send` when `until` held.

        to: which process gets the signal, given the command's.
        """
        log = self.place / "log.txt"
        where = {"folder": self.place, "out": log, "errors": log}
        pid = self._server.begin(*arguments, **where, environment={})
        sent = False
        while not self._server.ended(0.0005):
            if not sent and until():
                os.kill(to(pid), send)
                sent = True
        return self._server.code()

    def finish(self, *arguments: str) -> None:
        """Run to the end, which must be a good one."""
        code = self.run(*arguments)
        assert code == 0, (self.place / "log.txt").read_text()[-2000:]

    def close(self) -> None:
        self._server.close()


@pytest.fixture(scope="module")
def lorelei(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Iterator[Lorelei]:
    place = make_workplace(tmp_path_factory.mktemp("place"), tiny_tokenizer)
    algo = {"lr": 2e-3}  # slow enough that there is something to learn to the end
    write_run(place, "sync", steps=STEPS, eval={"every": 20}, algo=algo)
    write_run(place, "workers", steps=6, eval={"every": 0}, train={"workers": 2})
    write_run(
        place,
        "given_up",
        steps=6,
        eval={"every": 0},
        train={"workers": 2},
        cluster={"restarts": 0},
    )
    limits = {"max_head_offpolicyness": 2}
    write_run(place, "async", steps=ASYNC_STEPS, eval={"every": 0}, algo=algo, rollout=limits)
    teach = {"algo": {"kind": "sft", "lr": 1e-2}, "reward": None, "rollout": None}
    write_run(place, "teach", steps=2, eval={"every": 0}, **teach)
    student = {"kind": "distill", "teacher": "runs/teach:default@v1", **algo}
    write_run(place, "distil", steps=30, algo=student, reward=None, eval=None)
    server = Lorelei(place)
    yield server
    server.close()


@pytest.fixture(scope="module")
def undisturbed(lorelei: Lorelei) -> tuple[str, float]:
    """(the final snapshot, whose name has its digest, of a run left alone; how long it took)."""
    start = time.monotonic()
    lorelei.finish("train", "sync.yaml", "name=undisturbed")
    return final(lorelei.place / "runs/undisturbed"), time.monotonic() - start


def after(seconds: float) -> Callable[[], bool]:
    deadline = time.monotonic() + seconds
    return lambda: time.monotonic() > deadline


def writing(folder: Path, since: int) -> Callable[[], bool]:
    """Holds while a checkpoint after step `since` is being written: a temporary or unnamed file."""

    def seen() -> bool:
        steps = [int(path.stem) for path in manifest_paths(folder)]
        if not steps or max(steps) < since:
            return False
        snapshots = (folder / "snapshots/default").glob("*")
        return any(path.name[0] == "." or int(path.name[:6]) > max(steps) for path in snapshots)

    return seen


def start_or_resume(folder: Path) -> tuple[str, ...]:
    if (folder / "run.json").exists():
        return ("resume", f"runs/{folder.name}")
    return ("train", "sync.yaml", f"name={folder.name}")


def committed(folder: Path) -> int:
    return max([int(path.stem) for path in manifest_paths(folder)], default=-1)


def test_a_run_killed_at_ten_moments_ends_with_the_adapter_of_one_left_alone(
    lorelei: Lorelei, undisturbed: tuple[str, float]
) -> None:
    expected, seconds = undisturbed
    rng, folder = random.Random(0), lorelei.place / "runs/killed"
    crumbs = 0
    for number in range(KILLS):
        before = committed(folder)
        if number % 2:  # within the writing of a checkpoint, some steps on
            until = writing(folder, since=before + rng.randint(1, 2))
        else:  # whenever: while it starts, samples, trains or saves
            until = after(rng.uniform(0, seconds / 12))
        assert lorelei.run(*start_or_resume(folder), until=until) == -signal.SIGKILL
        if (folder / "run.json").exists():
            left = check_run(folder)
            assert all("left over from a crash" in line or "cut off" in line for line in left), left
            crumbs += bool(left)
            assert committed(folder) >= before, "a committed step was lost"
            stop(lorelei, folder, steps=1)
            assert check_run(folder) == []
    assert committed(folder) < STEPS, "the last kills came too late to test anything"
    assert crumbs >= 3, "the kills did not hit the writing of checkpoints"
    lorelei.finish("resume", "runs/killed")
    assert check_run(folder) == []
    assert final(folder) == expected
    assert [r["step"] for r in records(folder, "step")] == list(range(1, STEPS + 1))


def stop(lorelei: Lorelei, folder: Path, steps: int) -> None:
    """Resume, and stop as a user would, after some steps."""
    enough = committed(folder) + steps
    code = lorelei.run(
        *start_or_resume(folder), until=lambda: committed(folder) >= enough, send=signal.SIGTERM
    )
    assert code == 128 + signal.SIGTERM, (lorelei.place / "log.txt").read_text()[-2000:]


def test_a_killed_student_ends_with_the_adapter_of_one_left_alone(lorelei: Lorelei) -> None:
    lorelei.finish("train", "teach.yaml")
    lorelei.finish("train", "distil.yaml", "name=student")
    folder = lorelei.place / "runs/distil"
    arguments = ("train", "distil.yaml")
    for _ in range(3):
        until = reaches(folder, committed(folder) + 5)
        assert lorelei.run(*arguments, until=until) == -signal.SIGKILL
        arguments = ("resume", "runs/distil")
    lorelei.finish(*arguments)
    assert check_run(folder) == []
    assert final(folder) == final(lorelei.place / "runs/student")
    assert [r["step"] for r in records(folder, "step")] == list(range(1, 31))


def reaches(folder: Path, step: int) -> Callable[[], bool]:
    return lambda: committed(folder) >= step


def test_a_flipped_byte_is_named_and_the_checkpoint_before_is_used(
    lorelei: Lorelei, undisturbed: tuple[str, float]
) -> None:
    folder = lorelei.place / "runs/flipped"
    lorelei.run("train", "sync.yaml", "name=flipped", until=lambda: committed(folder) >= 5)
    newest = committed(folder)
    (snapshot,) = (folder / "snapshots/default").glob(f"{newest:06d}-*")
    data = bytearray(snapshot.read_bytes())
    data[len(data) // 2] ^= 0x10
    snapshot.write_bytes(data)
    assert any(str(snapshot) in line and "damaged" in line for line in check_run(folder))
    (lorelei.place / "log.txt").unlink()
    lorelei.finish("resume", "runs/flipped")
    log = " ".join((lorelei.place / "log.txt").read_text().split())
    assert f"warning: {newest:06d}.json passed over:" in log and snapshot.name in log
    assert f"resuming after step {newest - 1}" in log
    assert check_run(folder) == []
    assert final(folder) == undisturbed[0]


def test_an_asynchronous_run_keeps_finished_groups_over_a_kill(lorelei: Lorelei) -> None:
    folder = lorelei.place / "runs/async"
    reused = 0
    arguments = ("train", "async.yaml")
    for _ in range(3):
        until = spooled(folder, since=committed(folder) + 3)
        assert lorelei.run(*arguments, until=until) == -signal.SIGKILL
        arguments = ("resume", "runs/async")
        before = spool(folder)
        assert before, "no group was waiting"
        stop(lorelei, folder, steps=3)
        assert check_run(folder) == []
        after_it = spool(folder)
        assert all(after_it[index] == before[index] for index in before.keys() & after_it.keys())
        reused += len(before.keys() - after_it.keys())
    assert reused > 0
    lorelei.finish(*arguments)
    assert check_run(folder) == [] and final(folder)
    assert max(r["staleness_max"] for r in records(folder, "step")) <= 2
    assert spool(folder) == {}, "all groups were used"
    trained = prompts(folder)
    assert len(trained) == len(set(trained)) == ASYNC_STEPS * 2, "a prompt was trained on twice"
    stale = sum(r["errors"].get("stale", 0) for r in records(folder, "step"))
    order = order_of_prompts(folder)
    last = max(order[prompt] for prompt in trained)
    assert last < ASYNC_STEPS * 2 + stale, "a prompt was lost"


def prompts(folder: Path) -> list[str]:
    """The prompts that were trained on; each has 4 rollouts."""
    lines = (folder / "rollouts.jsonl").read_text().splitlines()
    return [record["prompt_id"] for record in map(json.loads, lines) if record["sample"] == 0]


def order_of_prompts(folder: Path) -> dict[str, int]:
    """{prompt: its place in the data order}."""
    (experiment,) = TrainedRun.read(folder).config.experiments()
    tokenizer = load_tokenizer(folder.parents[1] / "model")
    source = make_source(experiment.task, tokenizer, experiment.seed, eval_size=0)
    return {source.prompt(index).id: index for index in range(64)}


def test_a_killed_train_worker_is_started_again_and_the_step_redone(lorelei: Lorelei) -> None:
    lorelei.finish("train", "workers.yaml", "name=left-alone")
    folder = lorelei.place / "runs/workers"
    until: Callable[[], bool] = lambda: committed(folder) >= 2  # noqa: E731
    assert lorelei.run("train", "workers.yaml", until=until, to=train_worker) == 0
    log = (lorelei.place / "log.txt").read_text()
    assert "was killed by SIGKILL" in log and "restart 1 of at most 3" in log
    assert final(folder) == final(lorelei.place / "runs/left-alone") and check_run(folder) == []


def test_a_killed_train_worker_stops_a_run_without_restarts_which_can_be_resumed(
    lorelei: Lorelei,
) -> None:
    folder = lorelei.place / "runs/given_up"
    (lorelei.place / "log.txt").unlink(missing_ok=True)
    until: Callable[[], bool] = lambda: committed(folder) >= 2  # noqa: E731
    assert lorelei.run("train", "given_up.yaml", until=until, to=train_worker) == 2
    log = (lorelei.place / "log.txt").read_text()
    assert "Traceback" not in log and log.count("error: ") == 1
    assert "was killed by SIGKILL" in log and "all workers were stopped" in log
    assert f"saved after step {committed(folder)}; go on with: lorelei resume" in log
    assert check_run(folder) == []
    lorelei.finish("resume", "runs/given_up")
    assert final(folder) and check_run(folder) == []


def train_worker(pid: int) -> int:
    """One of the processes that a command has started to train."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if b"lorelei.train.remote.worker" in Path(f"/proc/{child}/cmdline").read_bytes():
            return int(child)
    raise AssertionError("there is no train worker")


def spool(folder: Path) -> dict[int, int]:
    """{index of a waiting group: when it was written}."""
    found: dict[int, int] = {}
    for path in (folder / "spool/default").glob("*.json"):
        with contextlib.suppress(FileNotFoundError):  # trained on in this moment
            found[int(path.stem)] = path.stat().st_mtime_ns
    return found


def spooled(folder: Path, since: int) -> Callable[[], bool]:
    """Holds, some steps on, when a group has been started and finished since the last commit."""

    def seen() -> bool:
        newest = committed(folder)
        if newest < since:
            return False
        manifest = json.loads((folder / f"manifests/{newest:06d}.json").read_text())
        position = manifest["adapters"]["default"]["record"]["state"]["next_index"]
        return max(spool(folder), default=-1) >= position

    return seen
