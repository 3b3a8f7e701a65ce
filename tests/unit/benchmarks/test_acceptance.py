"""docs/acceptance.md says what acceptance/results say; what does not hold is said first."""

from __future__ import annotations

import json
from importlib import import_module

import pytest

from acceptance import asynchronous, fifty_publishes, page, publishing, record
from acceptance.__main__ import main
from acceptance.traffic import gaps, rate

# tokens at 10 a second, but none between 1.0 and 1.5
TIMES = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.4, 1.5, 1.6, 1.7, 1.8]
COUNTS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10, 10, 11, 12, 13, 14]

FIFTY = {
    "publishes": 50,
    "tolerance": 1e-5,
    "largest_error": 2e-6,
    "nearest_other": 0.3,
    "grown_bytes": 100,
    "grown_later_bytes": 1_200_000,
    "adapter_bytes": 1000,
    "names_left": 0,
    "files_left": 0,
}


def test_rate_and_gaps_of_a_counter():
    assert rate(TIMES, COUNTS, [(0.0, 1.0)]) == pytest.approx(10)
    assert rate(TIMES, COUNTS, [(1.0, 1.4), (0.5, 0.9)]) == pytest.approx(5)
    assert max(end - start for start, end in gaps(TIMES, COUNTS)) == pytest.approx(0.5)
    assert len(gaps(TIMES, COUNTS)) == 13


def test_a_gap_counts_for_the_publication_that_it_meets():
    row = publishing.summary(TIMES, COUNTS, [(0.3, 0.4), (1.1, 1.45)], [0.2, 0.9], (0.0, 1.8))
    assert row["step_ms"] == pytest.approx(100)
    assert row["longest_gap_ms"] == {"between": 100, "publishing": 500}
    assert row["tokens_per_s"]["publishing"] == pytest.approx(1.5 / 0.45, abs=0.1)
    assert row["within_bound"] == 2, "0.5 s is less than two steps and a load of 0.35 s"
    late = publishing.summary(TIMES, COUNTS, [(1.1, 1.2)], [0.9], (0.0, 1.8))
    assert (late["within_bound"], late["within_bound_before"]) == (0, 1)
    slow = publishing.summary(TIMES, COUNTS, [(1.55, 1.65)], [1.3], (0.0, 1.8))
    assert (slow["within_bound"], slow["within_bound_before"]) == (1, 0)
    assert "1 of 1 publications held tokens up" in publishing.problems({**late, "aborted": 0})[0]


def test_aborted_requests_are_a_problem():
    row = {"aborted": 2, "publishes": 20, "within_bound": 20}
    assert publishing.problems(row) == ["2 requests were aborted"]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("largest_error", 2e-5, "differ by 2.0e-05"),
        ("nearest_other", 1e-6, "another version is as near"),
        ("grown_bytes", 1_000_000, "memory grew by 1.00 MB in 40"),
        ("names_left", 1, "1 names are left"),
        ("files_left", 3, "3 files are left"),
    ],
)
def test_what_fifty_publications_must_not_do(field, value, words):
    assert fifty_publishes.problems(FIFTY) == []
    (problem,) = fifty_publishes.problems({**FIFTY, field: value})
    assert words in problem


STEP = {
    "step": 2,
    "adapter": "a",
    "staleness_mean": 1,
    "staleness_max": 2,
    "trainer_idle": 0.75,
    "rollout_idle": 0.1,
    "dropped_stale": 0,
    "kl_sampler": 0,
    "generated_tokens": 40,
    "canary_version": 1e-6,
    "canary_told_apart": 1.0,
    "seconds": {"rollout": 3.0, "train": 0.5, "step": 4.0},
}


def test_steps_of_a_run_become_one_line():
    summary = asynchronous.summary([STEP, STEP])
    assert (summary["trainer_idle"], summary["step_s"], summary["tokens_per_s"]) == (0.75, 4, 10)
    assert (summary["staleness_max"], summary["canary"]) == (2, [1e-6, 1e-6])


def test_what_asynchronous_training_must_not_do():
    sides = {side: asynchronous.summary([STEP] * asynchronous.STEPS) for side in asynchronous.SIDES}
    sides["synchronous"]["staleness_max"] = 0
    assert asynchronous.problems({"sides": sides}) == []
    for field, value, words in (
        ("steps", 3, "3 of 10 steps"),
        ("staleness_max", 3, "tokens of 3 versions ago were trained on"),
        ("canary", [], "the canary saw 0 of the steps"),
    ):
        wrong = {**sides, "asynchronous": {**sides["asynchronous"], field: value}}
        (problem,) = asynchronous.problems({"sides": wrong})
        assert problem.startswith("asynchronous: ") and words in problem


ENGINES: dict[str, set[str]] = {  # of matrices that do not have all
    "hosts": {"vllm", "sglang"},
    "killed": set(),
    "megatron": set(),
    "rank_memory": set(),
}


def test_every_matrix_has_its_cases_and_every_engine_is_in_each():
    for matrix in page.MATRICES:
        cases = import_module(f"acceptance.{matrix}").CASES.values()
        engines = {case.engine for case in cases if hasattr(case, "engine")}
        assert engines == ENGINES.get(matrix, {"embedded", "vllm", "sglang"}), matrix


def test_committed_page_is_what_the_results_give():
    assert page.page() == page.PAGE.read_text(), "run `make acceptance ARGS=page`"


def test_a_problem_stands_before_the_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    assert "Nothing is measured yet." in page.page()
    record.keep("fifty_publishes", "embedded-memory-tiny", {**FIFTY, "problems": []})
    assert "Everything that was measured holds." in page.page()
    assert "asynchronous (embedded, vllm, sglang)" in page.page(), "what is not measured is named"
    record.keep("fifty_publishes", "vllm-disk-tiny", {**FIFTY, "problems": ["3 files are left"]})
    text = page.page()
    assert "- fifty_publishes vllm-disk-tiny: 3 files are left" in text.partition("##")[0]
    assert "| embedded | memory | tiny | 2.0e-06 |" in text
    assert len(json.loads((tmp_path / "fifty_publishes.json").read_text())["cases"]) == 2


def test_an_unknown_matrix_or_case_is_refused_with_those_there_are():
    for arguments, words in (
        (["speed"], "no matrix 'speed'; use logprobs, publishing"),
        (["publishing", "vllm"], "no case 'vllm'; use embedded-memory-tiny"),
    ):
        with pytest.raises(SystemExit, match=words):  # its words are those of an exit status 1
            main(arguments)
