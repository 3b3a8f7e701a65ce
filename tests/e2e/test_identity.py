"""A run knows what it was made with, and goes on when it was finished."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from lorelei.cli import main as cli
from lorelei.cli.trained_run import TrainedRun
from lorelei.launch import local
from lorelei.run_file import load_config
from lorelei.store.check import check_run
from lorelei.store.identity import read_identity, write_identity
from tests.tiny_runs import make_workplace, records, write_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A workplace with a run of 2 steps, finished, whose model is named as it is from here."""
    place = make_workplace(tmp_path_factory.mktemp("made"), tiny_tokenizer)
    before = Path.cwd()
    os.chdir(place)
    try:
        local.train(load_config(write_run(place, "r", steps=2, model="model")))
        assert lorelei("export", "r", "--out", "exported") == 0
    finally:
        os.chdir(before)
    return place


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The workplace, as it was made; what a test changes is put back."""
    kept = tmp_path / "kept"
    shutil.copytree(made, kept)
    monkeypatch.chdir(made)
    yield made
    monkeypatch.undo()
    shutil.rmtree(made)
    shutil.copytree(kept, made)


def lorelei(*arguments: str) -> int:
    """The exit code of a command, run in this process."""
    before, sys.argv = sys.argv, ["lorelei", *arguments]
    try:
        cli.main()
    except SystemExit as left:
        return int(left.code or 0)
    finally:
        sys.argv = before
    return 0


def other_weights(place: Path) -> None:
    path = place / "model/model.safetensors"
    save_file({n: t * 1.5 for n, t in load_file(path).items()}, path, metadata={"format": "pt"})


def other_template(place: Path) -> None:
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        path = place / "model" / name
        if path.is_file():
            path.write_text(path.read_text().replace("im_start", "im_begin"))


def appended(name: str) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        with open(place / name, "a") as file:
            file.write("\n")

    return change


CHAT = ("chat", "r", "--max-new-tokens", "2")
EXPORT = ("export", "r", "--out", "again")
# (what was changed, the command, the field that its error names; None: it does not read that)
COMPARED: list[tuple[Callable[[Path], None], tuple[str, ...], str | None]] = [
    (other_weights, ("resume", "r", "steps=3"), "model"),
    (other_weights, ("eval", "r"), "model"),
    (other_weights, CHAT, "model"),
    (other_weights, EXPORT, "model"),
    (other_template, ("eval", "r"), "model"),
    (appended("rows.jsonl"), ("resume", "r", "steps=3"), "task.path"),
    (appended("rows.jsonl"), ("eval", "r"), "task.path"),
    (appended("rewards.py"), ("resume", "r", "steps=3"), "reward.path"),
    (appended("rewards.py"), ("eval", "r"), "reward.path"),
    (appended("rewards.py"), EXPORT, None),
]


@pytest.mark.parametrize(("change", "command", "field"), COMPARED)
def test_what_changed_is_refused_by_name(
    place: Path,
    capfd: pytest.CaptureFixture[str],
    change: Callable[[Path], None],
    command: tuple[str, ...],
    field: str | None,
) -> None:
    change(place)
    code = lorelei(*command)
    errors = capfd.readouterr().err
    assert errors.count("\n") == 1
    (problem,) = check_run(place / "runs/r")
    if field is None:
        assert code == 0 and errors.startswith("warning: reward.path: is not what the run was made")
        return
    assert code == 2 and errors.startswith(f"error: {field}: is not what the run was made with: ")
    assert f"accept it with --accept-changed {field}" in errors and len(errors) < 400
    assert problem.startswith(f"{field}: is not what the run was made with")


def test_what_is_accepted_is_recorded(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    other_weights(place)
    folder = place / "runs/r"
    for _ in range(2):
        assert lorelei("export", "r", "--out", "again", "--accept-changed", "model") == 0
        shutil.rmtree("again")
    (change,) = read_identity(folder).changes
    assert (change.field, change.command) == ("model", "export")
    assert lorelei("resume", "r", "steps=3", "--accept-changed", "modl") == 2
    assert "'modl' is no input of this run; it has: model, task.path" in capfd.readouterr().err
    assert lorelei("resume", "r", "steps=3", "--accept-changed", "model") == 0
    assert [(c.field, c.command) for c in read_identity(folder).changes] == [
        ("model", "export"),
        ("steps", "resume"),
        ("model", "resume"),
    ]
    assert check_run(folder) == []
    assert lorelei("resume", "r", "steps=4") == 0


def test_a_model_named_from_here_is_the_same_from_elsewhere(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "model", tmp_path / "model")
    other_weights(tmp_path)
    os.chdir(tmp_path)
    assert lorelei("resume", str(place / "runs/r"), "steps=3") == 0
    assert TrainedRun.read(place / "runs/r").config.model == str(place / "model")


def test_a_model_that_moved_can_be_shown(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.move("model", "moved")
    assert lorelei("resume", "r", "steps=3") == 2
    assert "there is no folder" in capfd.readouterr().err
    assert lorelei("resume", "r", "steps=3", "model=moved") == 0
    assert lorelei("eval", "r") == 0 and check_run(place / "runs/r") == []


def test_a_run_that_recorded_nothing_says_that_it_does_now(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = place / "runs/r"
    recorded = read_identity(folder)
    write_identity(folder, recorded.changed([], inputs=None))
    other_weights(place)
    assert check_run(folder) == []
    assert lorelei("eval", "r") == 0
    assert lorelei("resume", "r", "steps=3") == 0
    said = capfd.readouterr().out
    assert "recorded what this run is made of, which its version of lorelei did not: model" in said
    assert read_identity(folder).inputs is not None
    assert read_identity(folder).inputs != recorded.inputs


# --- warm starts


def start(place: Path, **fields: Any) -> tuple[str, ...]:
    sections = {"lora": {"lora_rank": 4, "lora_alpha": 8, "init_from": "exported"}, **fields}
    write_run(place, "w", steps=1, eval={"every": 0}, **sections)
    return ("train", "w.yaml")


def test_an_adapter_of_another_base_is_refused(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert lorelei(*start(place), "name=same") == 0
    other_weights(place)
    assert lorelei(*start(place)) == 2
    (error,) = capfd.readouterr().err.splitlines()
    assert error.startswith("error: lora.init_from: the adapter in ") and "another base" in error
    assert not (place / "runs/w").exists()
    assert lorelei(*start(place), "--accept-changed", "lora.init_from") == 0
    (change,) = read_identity(place / "runs/w").changes
    assert (change.field, change.command) == ("lora.init_from", "train")


def test_an_adapter_that_names_another_base_is_warned_of(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (place / "exported/lorelei.json").unlink()
    path = place / "exported/adapter_config.json"
    for name, warned in ((str(place / "model"), False), ("/there/MODEL", False), ("o/x", True)):
        path.write_text(
            json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": name})
        )
        run = f"n{len(name)}"
        assert lorelei(*start(place), f"name={run}") == 0
        said = capfd.readouterr()
        assert ("says that it was trained on" in said.out + said.err) is warned, name


# --- more steps


SFT = {
    "algo": {"kind": "sft", "batch_size": 2},
    "reward": None,
    "rollout": {"kind": "embedded"},
}


def without_sampling(path: Path) -> Path:
    """A run file for examples: nothing is sampled or scored."""
    import yaml

    config = yaml.safe_load(path.read_text())
    for name in ("reward", "rollout"):
        config.pop(name, None)
    path.write_text(yaml.safe_dump(config))
    return path


def snapshots(folder: Path) -> dict[str, str]:
    """Step and sha256 of tensors and moments, by adapter."""
    manifest = TrainedRun.read(folder).manifest
    assert manifest.state["finished"] is True
    return {name: entry.snapshot for name, entry in manifest.adapters.items()}


RUNS: dict[str, dict[str, Any]] = {
    "rl": {},
    "sft": SFT,
    "schedule with a warm-up": {"optimizer": {"warmup_steps": 3}},
    "minibatches": {"algo": {"ppo_n_minibatches": 2}},
    "checkpoints apart": {"checkpoint": {"every": 3}},
    "without evaluation": {"eval": {"every": 0}},
}


@pytest.mark.parametrize("kind", RUNS)
def test_two_steps_and_two_more_are_four(place: Path, kind: str) -> None:
    for name, steps in (("whole", 4), ("parts", 2)):
        path = write_run(place, name, steps=steps, **RUNS[kind])
        local.train(load_config(without_sampling(path) if kind == "sft" else path))
    local.resume(place / "runs/parts", ["steps=4"])
    assert snapshots(place / "runs/parts") == snapshots(place / "runs/whole")
    steps = [r["step"] for r in records(place / "runs/parts", "step")]
    assert steps == [1, 2, 3, 4]
    assert check_run(place / "runs/parts") == []


def test_one_adapter_of_two_goes_on(place: Path) -> None:
    entries = {"a": {}, "b": {"seed": 5}}
    local.train(load_config(write_run(place, "two", steps=2, adapters=entries)))
    before = snapshots(place / "runs/two")
    local.resume(place / "runs/two", ["adapters.b.steps=3"])
    after = snapshots(place / "runs/two")
    assert after["a"] == before["a"] and after["b"] != before["b"]
    versions = {
        name: entry.record.version
        for name, entry in TrainedRun.read(place / "runs/two").manifest.adapters.items()
    }
    assert versions == {"a": 2, "b": 3}


def test_a_further_resume_knows_the_steps(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert lorelei("resume", "r", "steps=3") == 0
    assert "steps: 2 -> 3" in capfd.readouterr().out
    assert lorelei("resume", "r") == 0
    assert "finished already, after step 3" in capfd.readouterr().out
    assert [(c.before, c.after) for c in read_identity(place / "runs/r").changes] == [(2, 3)]
