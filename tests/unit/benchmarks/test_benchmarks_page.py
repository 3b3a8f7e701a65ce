"""docs/benchmarks.md says what benchmarks/results say, and which goals are not reached."""

from __future__ import annotations

import json
from math import inf
from pathlib import Path

import pytest

from benchmarks import goals, time_to_score, turns
from benchmarks import page as page_module
from benchmarks.__main__ import main
from benchmarks.goals import GOALS, Goal, goals_table
from benchmarks.grpo_step import section
from benchmarks.page import BENCHMARKS, PAGE, page
from benchmarks.sums import problems, score
from benchmarks.time_to_score import first_above

GRPO_STEP = {"cases": {"2x8": {"times_faster": 2.4}}}


@pytest.fixture
def a_goal(monkeypatch: pytest.MonkeyPatch) -> Goal:
    speed, memory = (g for g in GOALS if g.benchmark == "grpo_step")
    monkeypatch.setattr(goals, "GOALS", [speed, memory])
    return speed


def curves(*scores: float) -> list[dict[str, float]]:
    return [{"step": 2 * i, "seconds": 10.0 + 20 * i, "score": s} for i, s in enumerate(scores)]


def time_to_score_record(gain_of_trl: float) -> turns.Line:
    both = {"lorelei": curves(0.4, 0.5, 0.8), "trl": curves(0.4, 0.5, 0.5, 0.4 + gain_of_trl)}
    a, b = (first_above(curve) for curve in both.values())
    seed = {"curves": both, "lorelei": a, "trl": b}
    seed["times_faster"] = b["seconds"] / a["seconds"] if a and b else None
    summary = time_to_score.summary({"0": seed})
    return {"peer": "trl 1", "settings": time_to_score.settings(), **summary}


def test_committed_page_is_what_the_results_give():
    assert PAGE.read_text() == page(), "run `make page`"


def test_page_follows_the_results(tmp_path, monkeypatch):
    record = json.loads((turns.RESULTS / "grpo_step.json").read_text())
    record["cases"]["2x8"]["times_faster"] = 7.25
    record["machine"] |= {"cpu": "Abacus", "cores": 10}
    (tmp_path / "grpo_step.json").write_text(json.dumps(record))
    monkeypatch.setattr(turns, "RESULTS", tmp_path)
    text = page_module.page()
    assert "7.25 times faster" in text
    assert "- grpo_step: 10 cores of Abacus" in text
    assert "## Time to a score" not in text, "it has no results here"


def test_goal_that_is_missed_is_said_to_fall_short(a_goal):
    text = goals_table({"grpo_step": GRPO_STEP})
    assert text.startswith("Not reached: GRPO step")
    assert "goal at least 3, measured 2.4" in text
    assert "2.4: **falls short** |" in text
    assert text.endswith(f"*{a_goal.what}*: {a_goal.between}")


def test_goal_that_is_met_is_said_to_be_reached(a_goal):
    text = goals_table({"grpo_step": {"cases": {"2x8": {"times_faster": 3.0}}}})
    assert text.startswith("No measured goal falls short.")
    assert "| at least 3 | 3: reached |" in text
    assert a_goal.between not in text


@pytest.mark.parametrize("records", [{}, {"grpo_step": {"cases": {}}}])
def test_goal_without_a_measurement_is_said_to_have_none(a_goal, records):
    assert "| at least 3 | not measured |" in goals_table(records)


@pytest.mark.parametrize("low, high, inside", [(0.5, inf, True), (-inf, 0.9, False), (0, 1, True)])
def test_goal_is_reached_within_both_bounds(low, high, inside):
    goal = Goal(benchmark="", what="", measured=lambda _: None, at_least=low, at_most=high)
    assert goal.reached(1.0) is inside


def test_every_goal_is_of_a_benchmark_of_the_page():
    assert {goal.benchmark for goal in GOALS} <= set(BENCHMARKS)


def test_runner_names_the_benchmarks_when_there_is_none_of_that_name():
    with pytest.raises(SystemExit, match="no benchmark 'grpo_stp'; use grpo_step,"):
        main(["grpo_stp"])


def test_grpo_step_section_has_a_row_for_each_side_and_the_ratio():
    record = turns.kept("grpo_step")
    assert record is not None
    rows = [line for line in section(record).splitlines() if line.startswith("| 2x8 |")]
    sides = {"lorelei", "lorelei_avx2", "trl"} & record["cases"]["2x8"].keys()
    assert len(rows) == len(sides) + 1
    assert all(row.count("|") == 8 for row in rows)


def test_sum_is_scored_by_the_last_number():
    assert score("3 + 4 = 7.", "7") == 1
    assert score("7 is 3 + 4", "7") == 0
    assert score("no idea", "7") == 0
    assert {score(f"So it is {p['answer']}", p["answer"]) for p in problems()} == {1.0}


def test_gain_is_counted_from_the_score_before_training():
    point = first_above(curves(0.40625, 0.6, 0.70625, 0.9))
    assert point == {"step": 4, "seconds": 50.0, "score": 0.70625}
    assert first_above(curves(0.5, 0.7)) is None


def test_section_of_time_to_score_has_the_seconds_of_both_sides():
    text = time_to_score.section(time_to_score_record(gain_of_trl=0.3))
    assert "| 0 | 50 (step 4) | 0.40 to 0.80 | 70 (step 6) | 0.40 to 0.70 | 1.4 |" in text


def test_side_that_does_not_get_there_leaves_no_ratio():
    text = time_to_score.section(time_to_score_record(gain_of_trl=0.2))
    assert "| 0 | 50 (step 4) | 0.40 to 0.80 | never | 0.40 to 0.60 | - |" in text
    assert "| median | | | | | - |" in text


def test_picture_of_time_to_score_is_drawn_from_the_record(tmp_path: Path):
    out = tmp_path / "picture.png"
    time_to_score.draw(time_to_score_record(gain_of_trl=0.3), out)
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
