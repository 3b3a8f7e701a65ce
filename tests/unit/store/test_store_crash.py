"""The run folder under kill -9, full and read-only disks, and a second process."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from lorelei.lora.state import AdapterSnapshot, AdapterState, tensor_names
from lorelei.store.check import check_run
from lorelei.store.durable import StoreError, write_file, write_folder
from lorelei.store.manifest import AdapterRecord
from lorelei.store.run import RunStore
from lorelei.types import AdapterSpec

# the children start in milliseconds: they do not import torch again
FORK = multiprocessing.get_context("fork")


def snapshot(step: int, width: int = 64) -> AdapterSnapshot:
    a, b = tensor_names("model.layers.0.mlp.up_proj")
    tensors = {a: torch.full((4, width), float(step)), b: torch.full((width, 4), float(step))}
    state = AdapterState(spec=AdapterSpec(rank=4, alpha=8.0), tensors=tensors)
    return AdapterSnapshot(state=state, exp_avg=tensors, exp_avg_sq=tensors, step=step)


def commit(store: RunStore, step: int, width: int = 64) -> None:
    record = AdapterRecord(version=step, optimizer_step=step, state={"at": step})
    names = ("code", "math")
    pending = store.stage(
        step, {n: snapshot(step, width) for n in names}, {n: record for n in names}, {"at": step}
    )
    store.append_metrics({"step": step})
    store.append_rollouts([{"step": step, "sample": i} for i in range(3)])
    store.commit(pending, {})


def start(target: Callable[..., None], *args: object) -> tuple[multiprocessing.Process, Connection]:
    ours, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=target, args=(*args, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def kill(process: multiprocessing.Process) -> None:
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    # not join: it also waits for the process's own children
    _, status = os.waitpid(process.pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL


def train_until_killed(folder: Path, says: Connection) -> None:
    store = RunStore.open(folder)
    says.send((store.run_id, 0))
    step = store.latest.step if store.latest else 0
    while True:
        step += 1
        commit(store, step)
        says.send((store.run_id, step))


def test_run_killed_at_any_moment_resumes_at_its_last_committed_step(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    RunStore.create(folder, {}).close()
    moments = random.Random(7)
    used: set[str] = set()
    committed = crumbs = 0
    for attempt in range(24):
        process, heard = start(train_until_killed, folder)
        run_id, _ = heard.recv()
        assert run_id not in used
        used.add(run_id)
        if attempt % 4:  # or else at its first step
            committed = heard.recv()[1]
        # a busy machine takes longer for a step: kill within the time that the last one took
        begun = time.monotonic()
        if attempt % 4:
            committed = heard.recv()[1]
        time.sleep(moments.random() * max(time.monotonic() - begun, 0.003))
        kill(process)
        while heard.poll():
            try:
                committed = heard.recv()[1]
            except EOFError:
                break
        crumbs += bool(check_run(folder))
        with closing(RunStore.open(folder)) as store:
            used.add(store.run_id)
            assert store.warnings == []
            step = store.latest.step if store.latest else 0
            # the kill may come between the rename and the message
            assert step in (committed, committed + 1)
            committed = step
            if step:
                for name in ("code", "math"):
                    loaded = store.load(name)
                    assert loaded.state.digest() == snapshot(step).state.digest()
            for log, lines in (("metrics.jsonl", 1), ("rollouts.jsonl", 3)):
                rows = [json.loads(row) for row in (folder / log).read_text().splitlines()]
                assert [r["step"] for r in rows] == [
                    s for s in range(1, step + 1) for _ in range(lines)
                ]
        assert check_run(folder) == []
    assert crumbs  # a kill met a step half done


def hold(folder: Path, says: Connection) -> None:
    RunStore.open(folder)
    says.send(os.getpid())
    signal.pause()


def test_second_process_in_a_run_is_refused_and_told_which_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    RunStore.create(folder, {}).close()
    process, heard = start(hold, folder)
    pid = heard.recv()
    with pytest.raises(ValueError, match=rf"in use by process {pid};"):
        RunStore.open(folder)
    assert check_run(folder) == []  # readers need no lock
    kill(process)
    RunStore.open(folder).close()


def hold_and_fork(folder: Path, says: Connection) -> None:
    RunStore.open(folder)
    worker = os.fork()
    if worker == 0:
        says.send(os.getpid())
        time.sleep(20)
        os._exit(0)
    signal.pause()


def test_worker_that_outlives_a_killed_run_does_not_hold_its_lock(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    RunStore.create(folder, {}).close()
    process, heard = start(hold_and_fork, folder)
    worker = heard.recv()
    try:
        kill(process)
        RunStore.open(folder).close()
        os.kill(worker, 0)  # it was alive all the time
    finally:
        os.kill(worker, signal.SIGKILL)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 512 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk_costs_the_step_and_nothing_before_it(small_disk: Path) -> None:
    folder = small_disk / "run"
    with closing(RunStore.create(folder, {})) as store:
        commit(store, 1)
        with pytest.raises(StoreError, match=r"No space left .* KiB free\); free some space"):
            commit(store, 2, width=16384)
        assert not list(folder.rglob(".*"))
        assert store.latest.step == 1
        commit(store, 2)
        with pytest.raises(StoreError, match=r"metrics\.jsonl: cannot be written: No space left"):
            while True:
                store.append_metrics({"text": "x" * 30_000})
    with closing(RunStore.open(folder)) as store:
        assert store.latest.step == 2 and store.warnings == []
    assert check_run(folder) == []


def test_line_that_does_not_fit_leaves_no_half(small_disk: Path) -> None:
    with closing(RunStore.create(small_disk / "run", {})) as store:
        store.append_metrics({"step": 1})
        with pytest.raises(StoreError):
            store.append_metrics({"text": "x" * 600_000})
        store.append_metrics({"step": 2})
        lines = (small_disk / "run" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [{"step": 1}, {"step": 2}]


def test_read_only_disk_is_told_in_one_line(small_disk: Path) -> None:
    folder = small_disk / "run"
    RunStore.create(folder, {}).close()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for attempt in (
        lambda: RunStore.open(folder),
        lambda: RunStore.create(small_disk / "other", {}),
        lambda: write_file(folder / "x", b"x"),
        lambda: write_folder(folder / "x", {"x": b"x"}),
    ):
        with pytest.raises(StoreError, match=r"Read-only file system .*; make the folder writable"):
            attempt()
    assert check_run(folder) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission_is_told_in_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(StoreError, match=r"Permission denied .*; make the folder writable"):
        RunStore.create(tmp_path / "run", {})


def write_beyond_limit(folder: Path, says: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    write_file(folder / "a", b"old")
    for attempt in (
        lambda: write_file(folder / "a", bytes(2000)),
        lambda: write_folder(folder / "b", {"x": b"x", "y": bytes(2000)}),
    ):
        try:
            attempt()
        except StoreError as error:
            says.send(str(error))


def test_failed_write_keeps_the_old_content_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    process, heard = start(write_beyond_limit, tmp_path)
    for name in ("a", "b"):
        assert heard.recv().startswith(f"{tmp_path / name}: cannot be written: File too large (")
    process.join(10)
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def rewrite(path: Path, says: Connection) -> None:
    for i in range(60):
        write_file(path, bytes([i]) * 500_000)
    says.send("done")


def test_reader_never_sees_a_part_of_a_write(tmp_path: Path) -> None:
    write_file(tmp_path / "a", bytes(500_000))
    process, heard = start(rewrite, tmp_path / "a")
    while not heard.poll():
        data = (tmp_path / "a").read_bytes()
        assert len(data) == 500_000 and data.count(data[0]) == 500_000
    process.join(10)


def test_folder_is_not_written_over_another(tmp_path: Path) -> None:
    write_folder(tmp_path / "b", {"x": b"1"})
    with pytest.raises(StoreError, match="exists already"):
        write_folder(tmp_path / "b", {"x": b"2"})
    assert (tmp_path / "b" / "x").read_bytes() == b"1"
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
