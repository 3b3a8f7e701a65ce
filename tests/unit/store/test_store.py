"""The run folder: a step is committed or it did not happen."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from lorelei.lora.state import AdapterSnapshot, AdapterState, tensor_names
from lorelei.store.check import check_run
from lorelei.store.durable import CorruptFile, StoreError
from lorelei.store.index import list_runs, rebuild_index
from lorelei.store.manifest import AdapterRecord, Manifest, manifest_path
from lorelei.store.record import FORMAT, record_bytes
from lorelei.store.run import RunStore
from lorelei.types import AdapterRef, AdapterSpec

OLD_RUN = Path(__file__).parents[2] / "fixtures/run_before_jobs/before_jobs"
CONFIG = {"model": "tiny", "lora": {"lora_rank": 2}}


def snapshot(value: float, step: int) -> AdapterSnapshot:
    a, b = tensor_names("model.layers.0.mlp.up_proj")
    tensors = {a: torch.full((2, 4), float(value)), b: torch.full((3, 2), -float(value))}
    moments = {name: tensor / 3 for name, tensor in tensors.items()}
    state = AdapterState(spec=AdapterSpec(rank=2, alpha=4.0), tensors=tensors)
    return AdapterSnapshot(state=state, exp_avg=moments, exp_avg_sq=moments, step=step)


def record(version: int) -> AdapterRecord:
    return AdapterRecord(
        version=version,
        optimizer_step=version,
        state={"next_index": 8 * version, "reward": version / 10, "score": version / 4},
    )


def stage(store: RunStore, step: int, touched: dict[str, int], **kept: int) -> Manifest:
    """Stage `step`: {touched adapter: version}, and the untouched ones with theirs."""
    return store.stage(
        step,
        {name: snapshot(v, v) for name, v in touched.items()},
        {name: record(v) for name, v in (touched | kept).items()},
        {"seen": [step]},
    )


def commit(store: RunStore, step: int, touched: dict[str, int], **kept: int) -> None:
    pending = stage(store, step, touched, **kept)
    store.append_metrics({"step": step})
    refs = {
        name: AdapterRef(name=name, version=v, run_id=store.run_id, digest="ab" * 32)
        for name, v in touched.items()
    }
    store.commit(pending, refs)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    with closing(RunStore.create(tmp_path / "run", CONFIG)) as store:
        yield store


def reopened(store: RunStore) -> RunStore:
    store.close()
    return RunStore.open(store.folder)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def test_committed_step_comes_back_bit_exact(store: RunStore) -> None:
    commit(store, 1, {"math": 1})
    commit(store, 2, {"math": 2})
    with closing(reopened(store)) as again:
        assert again.warnings == []
        assert again.config == CONFIG
        assert again.latest == store.latest
        assert again.latest and again.latest.step == 2
        assert again.latest.state == {"seen": [2]}
        entry = again.latest.adapters["math"]
        assert entry.record == record(2)
        assert entry.ref and entry.ref.served_name == f"math-v2-{store.run_id}-abababababab"
        loaded, want = again.load("math"), snapshot(2, 2)
        assert loaded.step == 2 and loaded.state.spec == want.state.spec
        for part in ("exp_avg", "exp_avg_sq"):
            for name, tensor in getattr(want, part).items():
                assert torch.equal(getattr(loaded, part)[name], tensor)
        assert loaded.state.digest() == want.state.digest()
    assert check_run(store.folder) == []


def test_staged_step_that_was_not_committed_did_not_happen(store: RunStore) -> None:
    commit(store, 1, {"math": 1})
    stage(store, 2, {"math": 2})
    store.append_metrics({"step": 2})
    store.append_rollouts([{"reward": 1.0}])
    assert check_run(store.folder) == []  # running: work in progress is no problem
    store.close()
    assert [p for p in check_run(store.folder) if "left over" in p]
    with closing(RunStore.open(store.folder)) as again:
        assert again.latest and again.latest.step == 1
        assert (again.folder / "metrics.jsonl").read_text() == '{"step": 1}\n'
        assert (again.folder / "rollouts.jsonl").read_text() == ""
        assert len(list((again.folder / "snapshots").rglob("*.safetensors"))) == 1
    assert check_run(store.folder) == []


def test_untouched_adapter_keeps_its_earlier_snapshot_through_retention(store: RunStore) -> None:
    commit(store, 1, {"math": 1, "code": 1})
    first = store.latest.adapters["code"]
    for step in range(2, 6):
        commit(store, step, {"math": step}, code=1)
    assert store.latest.adapters["code"] == first
    assert torch.equal(
        next(iter(store.load("code").state.tensors.values())),
        next(iter(snapshot(1, 1).state.tensors.values())),
    )
    steps = sorted(p.name for p in (store.folder / "manifests").iterdir())
    assert steps == ["000004.json", "000005.json"]
    files = sorted(p.name[:6] for p in (store.folder / "snapshots").rglob("*.safetensors"))
    assert files == ["000001", "000004", "000005"]
    assert len((store.folder / "metrics.jsonl").read_text().splitlines()) == 5
    assert check_run(store.folder) == []


@pytest.mark.parametrize("what", ["snapshot", "manifest", "missing", "foreign"])
def test_damaged_newest_checkpoint_is_named_and_the_one_before_used(
    store: RunStore, what: str
) -> None:
    for step in (1, 2, 3):
        commit(store, step, {"math": step})
    store.close()
    manifest = manifest_path(store.folder, 3)
    newest = store.folder / store.latest.adapters["math"].snapshot
    if what == "snapshot":
        flip(newest, newest.stat().st_size // 2)
    elif what == "manifest":
        flip(manifest, manifest.read_text().index('"reward": 0.3') + 12)
    elif what == "missing":
        newest.unlink()
    else:
        body = json.loads(manifest.read_bytes())
        del body["sha256"]
        manifest.write_bytes(record_bytes(body | {"run": "00000000"}))
    named = manifest.name if what in ("manifest", "foreign") else newest.name
    assert any(named in line for line in check_run(store.folder))
    with closing(RunStore.open(store.folder)) as again:
        assert again.latest.step == 2
        assert len(again.warnings) == 1
        assert "000003.json" in again.warnings[0] and named in again.warnings[0]
        assert again.load("math").step == 2
        assert check_run(store.folder) == []
        commit(again, 3, {"math": 3})
    assert check_run(store.folder) == []


def test_manifest_that_the_newest_does_not_continue_is_passed_over(store: RunStore) -> None:
    for step in (1, 2, 3):
        commit(store, step, {"math": step})
    store.close()
    path = manifest_path(store.folder, 2)
    body = json.loads(path.read_bytes())
    del body["sha256"]
    path.write_bytes(record_bytes(body | {"state": {"reward": 9.0}}))
    why = f"{path}: is not what the manifest after it continues"
    assert check_run(store.folder)[0] == why
    with closing(RunStore.open(store.folder)) as again:
        assert again.latest.step == 3
        assert again.warnings == [f"000002.json passed over: {why}"]
    assert check_run(store.folder) == []


def test_run_without_any_sound_checkpoint_is_refused_and_left_as_it_is(store: RunStore) -> None:
    for step in (1, 2):
        commit(store, step, {"math": step})
    store.close()
    for path in (store.folder / "snapshots").rglob("*.safetensors"):
        flip(path, 9)
    before = sorted(store.folder.rglob("*"))
    with pytest.raises(CorruptFile, match="no checkpoint verifies"):
        RunStore.open(store.folder)
    assert sorted(store.folder.rglob("*")) == before


def test_redone_step_never_gets_a_name_that_was_used(store: RunStore) -> None:
    ids = [store.run_id]
    for _ in range(3):
        store = reopened(store)
        ids.append(store.run_id)
    store.close()
    (store.folder / "incarnation.json").write_bytes(b"")
    with closing(RunStore.open(store.folder)) as again:
        ids.append(again.run_id)
        assert "incarnation.json" in again.warnings[0]
    assert len(set(ids)) == 5
    assert len({run_id[:8] for run_id in ids}) == 1


def test_pending_keeps_the_state_it_was_staged_with(store: RunStore) -> None:
    state = {"seen": [1]}
    own: dict[str, list[int]] = {"pending": [1]}
    math = AdapterRecord(version=1, optimizer_step=1, state=own)
    pending = store.stage(1, {"math": snapshot(1, 1)}, {"math": math}, state)
    state["seen"].append(2)
    own["pending"].append(2)
    store.commit(pending, {})
    assert store.latest.state == {"seen": [1]}
    assert store.latest.adapters["math"].record.state == {"pending": [1]}


def test_what_came_after_the_staging_is_committed_with_it(store: RunStore) -> None:
    pending = stage(store, 1, {"math": 1, "code": 1})
    store.commit(pending, {}, {"math": {"score": 0.75}}, {"finished": True})
    with closing(reopened(store)) as again:
        assert again.latest and again.latest.state == {"seen": [1], "finished": True}
        states = {name: entry.record.state for name, entry in again.latest.adapters.items()}
        assert states == {"math": {"score": 0.75}, "code": record(1).state}


def test_log_writes_null_for_what_json_has_not(store: RunStore) -> None:
    store.append_metrics(
        {"a": float("nan"), "b": np.float32("inf"), "c": np.arange(2), "d": {1: 2}}
    )
    line = json.loads((store.folder / "metrics.jsonl").read_text())
    assert line == {"a": None, "b": None, "c": [0, 1], "d": {"1": 2}}


def test_lost_log_is_reported_and_does_not_block_the_resume(store: RunStore) -> None:
    commit(store, 1, {"math": 1})
    store.close()
    (store.folder / "metrics.jsonl").write_text("")
    assert "metrics.jsonl: has 0 bytes, 12 are committed" in check_run(store.folder)[0]
    with closing(RunStore.open(store.folder)) as again:
        assert "metrics.jsonl: has 0 of 12 committed bytes" in again.warnings[0]
        commit(again, 2, {"math": 2})
    assert check_run(store.folder) == []


@pytest.mark.parametrize(
    ("step", "touched", "kept", "message"),
    [
        (1, {"math": 2}, {}, "step: 1 must be after the committed step 1"),
        (2, {}, {"math": 2}, "moved from optimizer step 1 to 2"),
        (2, {"math": 0}, {}, r"adapters.math.version: 0 is below the committed 1"),
        (2, {}, {"math": 1, "new": 0}, "snapshots: 'new' has none"),
        (2, {"../x": 1}, {}, "adapter name: '../x' must match"),
    ],
)
def test_step_that_contradicts_the_last_is_refused(
    store: RunStore, step: int, touched: dict[str, int], kept: dict[str, int], message: str
) -> None:
    commit(store, 1, {"math": 1})
    with pytest.raises(ValueError, match=message):
        stage(store, step, touched, **kept)
    assert store.latest.step == 1


def test_ref_of_another_version_is_refused(store: RunStore) -> None:
    pending = stage(store, 1, {"math": 1})
    ref = AdapterRef(name="math", version=7, run_id=store.run_id, digest="00")
    with pytest.raises(ValueError, match=r"math@v7, staged is version 1"):
        store.commit(pending, {"math": ref})
    assert store.latest is None


def test_state_that_is_not_json_is_refused_before_anything_is_written(store: RunStore) -> None:
    for state in ({"x": float("nan")}, {"x": object()}):
        with pytest.raises(ValueError, match="only strings, finite numbers"):
            store.stage(1, {"math": snapshot(1, 1)}, {"math": record(1)}, state)
        own = AdapterRecord(version=1, optimizer_step=1, state=state)
        with pytest.raises(ValueError, match="only strings, finite numbers"):
            store.stage(1, {"math": snapshot(1, 1)}, {"math": own}, {})
    assert list((store.folder / "snapshots").iterdir()) == []
    pending = stage(store, 1, {"math": 1})
    with pytest.raises(ValueError, match="only strings, finite numbers"):
        store.commit(pending, {}, {"math": {"x": float("nan")}})
    assert store.latest is None and not list((store.folder / "manifests").iterdir())


def test_newer_format_is_refused_and_nothing_is_touched(store: RunStore) -> None:
    for step in (1, 2):
        commit(store, step, {"math": step})
    store.close()
    path = manifest_path(store.folder, 2)
    path.write_text(path.read_text().replace(f'"format": {FORMAT}', f'"format": {FORMAT + 1}'))
    with pytest.raises(StoreError, match=r"000002.json: format 3 is newer than 2.*upgrade"):
        RunStore.open(store.folder)
    assert path.exists()
    assert [line for line in check_run(store.folder) if "upgrade lorelei" in line]


def test_a_run_of_format_1_is_read_as_a_job_per_adapter(tmp_path: Path) -> None:
    folder = shutil.copytree(OLD_RUN, tmp_path / OLD_RUN.name)
    before = json.loads(manifest_path(OLD_RUN, 2).read_text())
    old = before["adapters"]["default"]["record"]
    assert (before["format"], sorted(old)) == (
        1,
        ["admission", "data_position", "optimizer_step", "version"],
    )
    assert check_run(folder) == []
    with closing(RunStore.open(folder)) as store:
        assert store.latest is not None
        assert store.warnings == [] and store.latest.state == {"finished": False}
        assert store.latest.adapters["default"].record == AdapterRecord(
            version=old["version"],
            optimizer_step=old["optimizer_step"],
            state={
                "next_index": old["data_position"],
                "pending": old["admission"]["pending"],
                "reward": before["state"]["reward"],
                "score": before["state"]["score"]["default"],
            },
        )
        assert store.load("default").step == old["optimizer_step"]
    assert json.loads(manifest_path(folder, 2).read_text()) == before, "what is written stays"


def test_folder_with_a_run_is_not_overwritten(store: RunStore) -> None:
    store.close()
    with pytest.raises(ValueError, match="has a run already"):
        RunStore.create(store.folder, CONFIG)


def test_folder_without_a_run_is_refused_and_not_changed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no run\.json"):
        RunStore.open(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["Run", "a b", "-x"])
def test_run_name_outside_the_pattern_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="run name"):
        RunStore.create(tmp_path / name, CONFIG)


def test_keeping_one_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint\.keep: 1 must be 2 or more"):
        RunStore.create(tmp_path / "run", CONFIG, keep=1)


@pytest.mark.parametrize("log", ["metrics.jsonl", "rollouts.jsonl"])
def test_check_names_a_damaged_log_line(store: RunStore, log: str) -> None:
    store.append_rollouts([{"reward": 1.0}])
    commit(store, 1, {"math": 1})
    store.close()
    flip(store.folder / log, 0)
    assert check_run(store.folder)[0].startswith(f"{store.folder / log}: line 1: not JSON")


def test_summaries_tell_model_steps_reward_and_status(store: RunStore) -> None:
    runs = store.folder.parent
    assert [(r.status, r.steps, r.model) for r in list_runs(runs)] == [("running", 0, "tiny")]
    commit(store, 1, {"math": 1, "code": 3})
    store.close()
    (run,) = list_runs(runs)
    assert (run.name, run.steps, run.adapters) == ("run", 1, ("math", "code"))
    assert (run.reward, run.score, run.status) == (0.2, 0.5, "stopped")
    manifest_path(store.folder, 1).write_text("{}")
    assert list_runs(runs)[0].status == "damaged"


def test_an_adapter_without_a_reward_does_not_count_in_the_summary(store: RunStore) -> None:
    none = AdapterRecord(version=1, optimizer_step=1, state={"step": 1, "score": None})
    both = {"math": record(1), "fitted": none}
    pending = store.stage(1, {name: snapshot(1, 1) for name in both}, both, {})
    store.commit(pending, {}, state={"finished": True})
    store.close()
    (run,) = list_runs(store.folder.parent)
    assert (run.reward, run.score, run.status) == (0.1, 0.25, "finished")


def test_looking_at_runs_does_not_load_torch() -> None:
    code = "import sys, lorelei.store.check, lorelei.store.index; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def test_index_comes_back_equal_from_the_files(store: RunStore) -> None:
    for step in (1, 2):
        commit(store, step, {"math": step})
    rows = []
    for _ in range(2):
        with closing(sqlite3.connect(rebuild_index(store.folder))) as index:
            rows.append(
                index.execute(
                    "select step, adapter, version, json_extract(record, '$.step') "
                    "from adapters join metrics on line = step order by step"
                ).fetchall()
            )
        (store.folder / "index.sqlite").unlink()
    assert rows == [[(1, "math", 1, 1), (2, "math", 2, 2)]] * 2
