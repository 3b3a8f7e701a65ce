"""The scorers for reasoning-gym and mathematics."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
from typing import Any

import pytest
from reasoning_gym.factory import DATASETS, create_dataset

from lorelei.reward import math_verify, reasoning_gym
from lorelei.reward.answer import last_number, lenient_match
from lorelei.reward.pool import RewardPool


def entry(name: str, index: int = 0, **config: Any) -> dict[str, Any]:
    item = create_dataset(name, seed=1, size=10, **config)[index]
    return json.loads(json.dumps({**item, "dataset": name, "config": config}))


def strict(data: dict[str, Any], completion: str) -> float:
    value, metrics = reasoning_gym.score(data, completion)
    assert metrics["strict"] == value
    return value


def lenient(data: dict[str, Any], completion: str) -> float:
    return reasoning_gym.score(data, completion)[1]["lenient"]


# --- reasoning-gym


def test_gold_answer_scores_one_bare_padded_or_in_tags():
    data = entry("chain_sum")
    gold = data["answer"]
    for text in (gold, f"  {gold}\n", f"I add. <answer> {gold} </answer> Done."):
        assert strict(data, text) == 1.0
        assert lenient(data, text) == 1.0
    assert strict(data, str(int(gold) + 1)) < 0.1
    assert lenient(data, str(int(gold) + 1)) == 0.0


def test_lenient_sees_an_answer_behind_words_and_strict_does_not():
    data = entry("chain_sum")
    text = f"The sum of these numbers is {data['answer']}."
    assert strict(data, text) < 1.0
    assert lenient(data, text) == 1.0


def test_last_tagged_answer_counts():
    data = entry("chain_sum")
    assert strict(data, f"<answer>1.5</answer> no, <answer>{data['answer']}</answer>") == 1.0
    assert strict(data, f"<answer>{data['answer']}</answer> no, <answer>1.5</answer>") < 1.0


def test_answer_after_a_mark_counts_and_without_the_mark_the_whole_text():
    data = entry("chain_sum")
    gold = data["answer"]

    def after(text: str) -> float:
        return reasoning_gym.score(data, text, answer_after="=")[0]

    assert after(f"1 = 1, so a + b = {gold}") == 1.0
    assert after(f"a + b = {gold} apples") < 1.0
    assert after(gold) == 1.0
    assert after(f"<answer>{gold}</answer>") == 1.0
    assert after(f"{gold} = {int(gold) + 1}") < 0.1


def test_scorer_reads_the_config_of_its_dataset():
    # puzzle24 refuses solutions with numbers outside the configured range
    data = next(d for i in range(10) if max((d := entry("puzzle24", i))["metadata"]["numbers"]) > 6)
    assert strict(data, data["answer"]) == 1.0
    assert strict({**data, "config": {"max_value": 6}}, data["answer"]) < 0.1


@pytest.mark.parametrize("name", ["arc_agi", "rearc", "n_queens", "spiral_matrix", "binary_matrix"])
def test_gold_answer_scores_one_after_json(name):
    data = entry(name)
    assert strict(data, data["answer"]) == 1.0


@pytest.mark.parametrize("name", ["prime_factorization", "game_of_life", "boxnet"])
def test_answer_that_the_library_cannot_read_is_wrong(name):
    # their scorers raise ValueError, KeyError and AttributeError on some of these
    data = entry(name)
    assert all(strict(data, text) < 0.1 for text in ("foo bar", '{"a": 1}', "[1, 2]", ""))


@pytest.mark.parametrize("name", sorted(reasoning_gym.SYMPY_DATASETS))
def test_gold_formulas_are_plain_formulas(name):
    for data in (entry(name, index) for index in range(10)):
        # sympy finds some antiderivatives only as 'Integral(...)', which solves nothing
        assert strict(data, data["answer"]) == float("Integral" not in data["answer"])


@pytest.mark.parametrize("name", sorted(reasoning_gym.EVAL_DATASETS | reasoning_gym.SYMPY_DATASETS))
def test_no_answer_is_ever_run(name, tmp_path):
    data, ran = entry(name), tmp_path / "ran"
    code = f"[__import__('pathlib').Path('{ran}').touch()]"
    for text in (code, code[1:-1], f"x.__class__({code})", f"exec({code!r})"):
        strict(data, text)
    assert not ran.exists()


def test_the_lists_of_scorers_that_run_answers_are_complete():
    runs = re.compile(r"(?<!literal_)\b(eval|exec|parse_expr|sympify)\(")
    found = {n for n, (c, _) in DATASETS.items() if runs.search(inspect.getsource(c.score_answer))}
    assert found == reasoning_gym.EVAL_DATASETS | reasoning_gym.SYMPY_DATASETS


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("3*x**2/2 + exp(2*x)*sin(x) + C", True),
        ("(1.5 + 2) * 3 - 4/5", True),
        ("x.real", False),
        ("x. real", False),
        ("exit()", False),
        ("eval(x)", False),
        ("x__y", False),
        ("'a'", False),
        ("x[0]", False),
        ("ｅxit()", False),
    ],
)
def test_plain_formulas_have_numbers_letters_and_known_functions_only(text, plain):
    assert reasoning_gym.is_plain_formula(text) is plain


# --- the lenient reading


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("a 12 b 30", "30"),
        ("total: 1,234,567.", "1234567"),
        ("3, 4", "4"),
        ("-7", "-7"),
        ("10-5", "5"),
        ("x = -0.50 kg", "-0.5"),
        (".5", "0.5"),
        ("1,23", "23"),
    ],
)
def test_last_number_of_a_text(text, number):
    assert str(last_number(text)).rstrip("0") == number.rstrip("0")


@pytest.mark.parametrize(
    ("text", "gold", "match"),
    [
        ("So it is 42.0", "42", True),
        ("42 and then 43", "42", False),
        ("nothing", "42", False),
        ("I think:\n  Knight. ", "knight", True),
        ("knight", "Knight", True),
        ("a knight or a knave", "knight", False),
        ("Grid:\n1 2\n3 4", "1 2\n3 4", True),
    ],
)
def test_lenient_match_is_on_the_end_of_the_text(text, gold, match):
    assert lenient_match(text, gold) is match


# --- mathematics


@pytest.mark.parametrize(
    ("gold", "completion", "value"),
    [
        ("He has 3 * 4 = <<3*4=12>>12 apples.\n#### 12", "so the answer is 12.", 1.0),
        ("#### 1,200", "It costs $1200.", 1.0),
        ("#### 12", "13", 0.0),
        ("1/2", r"thus $\boxed{0.5}$", 1.0),
        (r"\frac{1}{2}", r"$\frac{2}{4}$", 1.0),
        (12, "12", 1.0),
        ("12", "no idea", 0.0),
    ],
)
def test_math_verify_compares_values(gold, completion, value):
    scored, metrics = math_verify.score({"answer": gold}, completion)
    assert scored == value
    assert metrics["parsed"] == float(completion != "no idea")


@pytest.mark.parametrize(
    ("kind", "data"), [("reasoning_gym", entry("chain_sum")), ("math_verify", {"answer": "#### 7"})]
)
def test_scorers_run_in_workers(kind, data):
    pool = RewardPool(kind, workers=1)
    gold = data["answer"].removeprefix("#### ")
    result = asyncio.run(pool.score(data, gold))
    pool.close()
    assert (result.value, result.error) == (1.0, None)
