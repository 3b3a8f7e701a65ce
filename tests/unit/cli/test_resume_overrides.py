"""What a resume may be given, and what it refuses by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorelei.config.errors import ConfigError
from lorelei.launch.amend import Amended, amend, check_steps
from lorelei.run_file import load_config, to_plain
from lorelei.store.manifest import AdapterEntry, AdapterRecord, Manifest, is_finished

ONE = """
model: org/name
steps: 2
task: {kind: jsonl, path: rows.jsonl}
reward: {kind: python, path: rewards.py:score}
eval: {every: 1, n_prompts: 4}
"""
TWO = ONE + "adapters: {a: {}, b: {steps: 3, eval: {every: 0}, task: {eval_size: 0}}}\n"


def recorded(tmp_path: Path, text: str) -> dict[str, Any]:
    (tmp_path / "run.yaml").write_text(text)
    return to_plain(load_config(tmp_path / "run.yaml"))


ALLOWED = [
    (ONE, ["steps=4"], ["steps: 2 -> 4"]),
    (ONE, ["adapters.default.steps=4"], ["steps: 2 -> 4"]),
    (ONE, ["steps=2"], []),
    (ONE, ["lora.lora_rank=16"], []),  # as it is
    (ONE, ["eval.every=2", "eval.temperature=0.5"], ["eval.every: 1 -> 2", "eval.temperature: 0"]),
    (ONE, ["eval.every=0", "task.eval_size=4"], ["task.eval_size: None -> 4", "eval.every: 1"]),
    (ONE, ["eval.n_prompts=2", "task.eval_size=4"], ["task.eval_size: None -> 4", "eval.n_pro"]),
    (ONE, ["threads=3", "checkpoint.keep=5"], ["threads: None -> 3", "checkpoint.keep: 2 -> 5"]),
    (ONE, ["reward.timeout=60", "reward.workers=4"], ["reward.timeout: 10.0 ->", "reward.workers"]),
    (ONE, ["train.max_tokens_per_mb=64"], ["train.max_tokens_per_mb: "]),
    (ONE, ["rollout.max_running=8"], ["rollout.max_running: 64 -> 8"]),
    (ONE, ["model=org/moved"], ["model: 'org/name' -> 'org/moved'"]),
    (TWO, ["steps=6"], ["steps: 2 -> 6", "adapters.a.steps: 2 -> 6"]),
    (TWO, ["adapters.b.steps=9"], ["adapters.b.steps: 3 -> 9"]),
]


@pytest.mark.parametrize(("text", "overrides", "notes"), ALLOWED, ids=lambda v: str(v)[:40])
def test_what_does_not_change_what_was_trained_is_taken(
    tmp_path: Path, text: str, overrides: list[str], notes: list[str]
) -> None:
    plain = recorded(tmp_path, text)
    amended = amend(plain, overrides)
    assert len(amended.notes) == len(notes), amended.notes
    assert all(one.startswith(note) for one, note in zip(amended.notes, notes, strict=True))
    # a further resume knows it
    assert amend(to_plain(amended.config), []).config == amended.config
    assert amend(to_plain(amended.config), overrides).changes == []


REFUSED = [
    (ONE, "seed=1", "seed: a resume cannot change 0 to 1: the order of the data"),
    (ONE, "lora.lora_rank=8", "lora.lora_rank: a resume cannot change 16 to 8: the adapter that"),
    (ONE, "lora.init_from=x", "lora.init_from: a resume cannot change None to "),
    (ONE, "optimizer.lr=1", "optimizer.lr: a resume cannot change 0.0002 to 1"),
    (ONE, "algo.lr=1", "optimizer.lr: a resume cannot change 0.0002 to 1"),
    (ONE, "algo.kind=rloo", "algo.kind: a resume cannot change 'grpo' to 'rloo': how it learns"),
    (ONE, "algo.batch_size=2", "algo.batch_size: a resume cannot change "),
    (ONE, "rollout.max_new_tokens=9", "rollout.max_new_tokens: a resume cannot change 64 to 9"),
    (ONE, "rollout.kind=vllm", "rollout.kind: a resume cannot change 'embedded' to 'vllm'"),
    (ONE, "train.kind=fsdp", "train.kind: a resume cannot change 'archon' to 'fsdp': the settings"),
    (ONE, "task.answer_field=x", "task.answer_field: a resume cannot change 'answer' to 'x'"),
    (ONE, "task.kind=parquet", "task.kind: a resume cannot change 'jsonl' to 'parquet'"),
    (ONE, "reward.kind=math_verify", "reward.kind: a resume cannot change 'python' to 'math_ver"),
    (ONE, "dtype=bfloat16", "dtype: a resume cannot change 'float32' to 'bfloat16': the base"),
    (ONE, "name=x", "name: a resume cannot change 'run' to 'x': the run is where its folder is"),
    (ONE, "eval.every=0", "eval: 0 problems would be held out of adapter default's data, not 4"),
    (ONE, "eval.n_prompts=8", "eval: 8 problems would be held out of adapter default's data"),
    (ONE, "stepz=4", "stepz: unknown key; did you mean 'steps'?"),
    (ONE, "steps", "override 'steps': write key=value"),
    (ONE, "steps=many", "steps: 'many' is not allowed"),
    (ONE, "adapters.x.steps=4", "adapters.x.steps: a resume adds and removes no adapter"),
    (TWO, "adapters.c.steps=4", "with NAME one of: a, b"),
    (TWO, "adapters.b.eval.every=1", "adapters.b.eval.n_prompts: 4 is more than task.eval_size: 0"),
    (TWO, "adapters.a.seed=4", "adapters.a.seed: a resume cannot change 0 to 4"),
]


@pytest.mark.parametrize(("text", "override", "expected"), REFUSED, ids=lambda v: str(v)[:40])
def test_what_changes_it_is_refused_by_name(
    tmp_path: Path, text: str, override: str, expected: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        amend(recorded(tmp_path, text), [override])
    assert expected in str(refused.value) and "\n" not in str(refused.value)


def at(steps: dict[str, dict[str, int]]) -> Manifest:
    """A manifest of a finished run; {adapter: version and state}."""
    adapters = {
        name: AdapterEntry(
            record=AdapterRecord(
                version=own.get("version", 0),
                optimizer_step=0,
                state={k: v for k, v in own.items() if k != "version"},
            ),
            snapshot="",
            ref=None,
        )
        for name, own in steps.items()
    }
    return Manifest(
        run="", incarnation=1, step=2, created="", parent_step=None, parent_sha256=None,
        adapters=adapters, files={}, logs={}, state={"finished": True}, sha256="",
    )  # fmt: skip


def amended(tmp_path: Path, text: str, *overrides: str) -> Amended:
    return amend(recorded(tmp_path, text), overrides)


@pytest.mark.parametrize(
    ("text", "override", "steps", "expected"),
    [
        (ONE, "steps=1", {"default": {"version": 2}}, "steps: 1 is not above the 2 steps that"),
        (ONE, "steps=2", {"default": {"version": 2}}, None),  # nothing changes
        (ONE, "steps=3", {"default": {"version": 1, "step": 3}}, "steps: 3 is not above the 3"),
        (TWO, "adapters.b.steps=2", {"b": {"version": 3}}, "adapters.b.steps: 2 is not above the"),
        (TWO, "adapters.b.steps=2", {"a": {"version": 3}}, None),  # b was removed
    ],
)
def test_an_adapter_cannot_end_before_it_stands(
    tmp_path: Path, text: str, override: str, steps: dict[str, dict[str, int]], expected: str | None
) -> None:
    found = amended(tmp_path, text, override)
    if expected is None:
        assert check_steps(found, at(steps)) == []
    else:
        with pytest.raises(ConfigError, match=expected):
            check_steps(found, at(steps))


def test_a_schedule_that_depends_on_the_steps_says_its_new_rate(tmp_path: Path) -> None:
    text = ONE + "optimizer: {lr: 1.0e-3, lr_schedule: linear}\n"
    (line,) = check_steps(amended(tmp_path, text, "steps=4"), at({"default": {"version": 2}}))
    assert line == (
        "default: the linear schedule now spans 4 steps: the rate of step 3 is 0.0005, not 0"
    )


@pytest.mark.parametrize(
    ("text", "overrides", "steps", "finished"),
    [
        (ONE, (), {"default": {"version": 2}}, True),
        (ONE, ("steps=4",), {"default": {"version": 2}}, False),
        (ONE, ("checkpoint.keep=4",), {"default": {"version": 2}}, True),
        (TWO, (), {"a": {"version": 2}, "b": {"version": 1, "step": 3}}, True),
        (TWO, ("adapters.b.steps=4",), {"a": {"version": 2}, "b": {"version": 3}}, False),
        (TWO, ("adapters.b.steps=4",), {"a": {"version": 2}}, True),  # b was removed
        (ONE, ("steps=4",), {"guest": {"version": 2}}, True),  # was added to the live run
    ],
)
def test_a_run_with_more_steps_is_not_finished(
    tmp_path: Path,
    text: str,
    overrides: tuple[str, ...],
    steps: dict[str, dict[str, int]],
    finished: bool,
) -> None:
    config = to_plain(amended(tmp_path, text, *overrides).config)
    assert is_finished(at(steps), config) is finished
