"""History: what metrics.jsonl says is read once, whole and typed."""

import json
from math import isnan, nan
from pathlib import Path

import pytest

from lorelei.obs.history import read_metrics


def write(path: Path, *records: dict, tail: str = "") -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + tail)
    return path


def step(number: int, reward: float = 0.5, adapter: str = "default") -> dict:
    return {"kind": "step", "step": number, "adapter": adapter, "reward": reward}


def evaluation(number: int, strict: float) -> dict:
    return {"kind": "eval", "step": number, "adapter": "default", "scores": {"strict": strict}}


def test_records_come_back_typed_and_by_adapter(tmp_path: Path) -> None:
    full = {
        **step(1, 0.25, "spelling"),
        "version": 3,
        "seconds": {"step": 2.5, "rollout": 1.5, "train": 1},
        "errors": {"timeout": 2, "parse": 0},
        "staleness_max": 1,
        "staleness_histogram": {"0": 8},
    }
    history = read_metrics(write(tmp_path / "m", evaluation(0, 0.1), full, step(1)))
    assert history.adapters == ("spelling", "default")
    (record,) = history.steps["spelling"]
    assert (record.version, record.reward, record.step_seconds) == (3, 0.25, 2.5)
    assert record.seconds == {"step": 2.5, "wait": 1.5, "train": 1.0}, "as later runs name them"
    assert record.errors == {"timeout": 2}
    assert record.staleness_max == 1.0
    assert history.evals["default"][0].scores == {"strict": 0.1}


def test_absent_and_null_numbers_are_nan(tmp_path: Path) -> None:
    history = read_metrics(write(tmp_path / "m", {**step(1), "kl_sampler": None}))
    (record,) = history.steps["default"]
    assert isnan(record.kl_sampler)
    assert isnan(record.grad_norm)
    assert isnan(record.step_seconds)


def test_a_score_that_was_not_measured_is_absent(tmp_path: Path) -> None:
    record = {**evaluation(1, 0.5), "scores": {"strict": 0.5, "lenient": None, "format": nan}}
    history = read_metrics(write(tmp_path / "m", record))
    assert history.evals["default"][0].scores == {"strict": 0.5}


@pytest.mark.parametrize("tail", ['{"kind": "st', '{"kind": "step", "step": 2, "adapter": "d'])
def test_a_torn_last_line_is_left_out(tmp_path: Path, tail: str) -> None:
    history = read_metrics(write(tmp_path / "m", step(1), tail=tail))
    assert [r.step for r in history.steps["default"]] == [1]


def test_a_last_line_torn_inside_a_character_is_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "m", step(1))
    path.write_bytes(path.read_bytes() + '{"note": "ä'.encode()[:-1])
    assert [r.step for r in read_metrics(path).steps["default"]] == [1]


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = write(tmp_path / "m", step(1))
    path.write_text(path.read_text() + "{torn\n" + json.dumps(step(2)) + "\n")
    with pytest.raises(ValueError, match=r"m:2: not JSON"):
        read_metrics(path)


def test_a_record_without_its_step_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'step' is absent"):
        read_metrics(write(tmp_path / "m", {"kind": "step", "adapter": "default"}))


def test_a_step_redone_after_a_resume_replaces_what_followed_it(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m",
        evaluation(0, 0.1),
        step(1),
        step(2, 0.2),
        evaluation(2, 0.2),
        step(3, 0.3),
        evaluation(4, 0.4),
        step(2, 0.9),
    )
    history = read_metrics(path)
    assert [(r.step, r.reward) for r in history.steps["default"]] == [(1, 0.5), (2, 0.9)]
    assert [r.step for r in history.evals["default"]] == [0, 2]


def test_an_evaluation_written_again_counts_once(tmp_path: Path) -> None:
    history = read_metrics(write(tmp_path / "m", evaluation(5, 0.1), evaluation(5, 0.2)))
    assert [r.scores["strict"] for r in history.evals["default"]] == [0.2]


def test_other_kinds_of_records_are_skipped(tmp_path: Path) -> None:
    history = read_metrics(write(tmp_path / "m", {"kind": "canary"}, step(1)))
    assert history.adapters == ("default",)


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.jsonl: no such file"):
        read_metrics(tmp_path / "nothing.jsonl")
