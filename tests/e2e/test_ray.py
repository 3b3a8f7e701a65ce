"""A run whose train workers are on the nodes of a Ray cluster, and lose them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from lorelei.process_guard import descendants
from lorelei.store.check import check_run
from lorelei.store.manifest import manifest_paths
from tests.ray_nodes import RayNodes, ray_nodes
from tests.tiny_runs import final, lorelei, make_workplace, write_run

pytest.importorskip("ray")
STEPS = 16


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    with ray_nodes(3) as found:
        yield found


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    place = make_workplace(tmp_path_factory.mktemp("place"), tiny_tokenizer)
    shared = {"steps": STEPS, "eval": {"every": 0}, "train": {"workers": 2}}
    write_run(place, "here", **shared)
    write_run(place, "ray", **shared, cluster={"kind": "ray", "spread": "strict", "wait": 60})
    return place


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_worker_and_then_a_node_are_killed_and_the_adapter_is_that_of_a_run_left_alone(
    place: Path, nodes: RayNodes
) -> None:
    lorelei(place, "train", "here.yaml")
    with (place / "log.txt").open("w") as log:
        run = subprocess.Popen(
            [sys.executable, "-m", "lorelei", "train", "ray.yaml"],
            cwd=place,
            env=dict(nodes.environment),
            stdout=log,
            stderr=log,
        )
    folder = place / "runs/ray"
    until(run, lambda: committed(folder) >= 2)
    workers = nodes.workers()
    assert len(workers) == 2, "one on each of two nodes"
    os.kill(workers[1], signal.SIGKILL)
    until(run, lambda: committed(folder) >= 4)
    os.kill(raylet_of(nodes, nodes.workers()[0]), signal.SIGKILL)
    until(run, lambda: run.poll() is not None)
    told = (place / "log.txt").read_text()
    assert run.returncode == 0, told[-3000:]
    assert "was killed by SIGKILL" in told and told.count("; restart 1 of at most 3") == 2, told
    assert final(folder) == final(place / "runs/here") and check_run(folder) == []


def committed(folder: Path) -> int:
    return max([int(path.stem) for path in manifest_paths(folder)], default=-1)


def until(run: subprocess.Popen[bytes], reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 100
    while not reached():
        assert run.poll() is None and time.monotonic() < deadline, "see log.txt"
        time.sleep(0.02)


def raylet_of(nodes: RayNodes, worker: int) -> int:
    """The node that a train worker is on."""
    return next(raylet for raylet in nodes.raylets if worker in descendants(raylet))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "arguments", "words"),
    [
        ({"RAY_AUTH_TOKEN": "0" * 32}, (), "that takes our token"),
        (
            {},
            ("train.workers=9", "cluster.wait=3"),
            "cluster.wait: 3 s have passed and Ray has no room",
        ),
    ],
)
def test_a_cluster_that_cannot_be_used_is_one_line(
    place: Path, nodes: RayNodes, wrong: dict[str, str], arguments: tuple[str, ...], words: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lorelei", "train", "ray.yaml", "name=refused", *arguments],
        cwd=place,
        env={**nodes.environment, **wrong},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert words in line and "Traceback" not in done.stderr
    assert not (place / "runs/refused").exists()
