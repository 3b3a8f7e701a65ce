"""Reward functions in a user's file: what they are called with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from lorelei.reward.contract import NotANumber, Sample, Scorer, read_score
from lorelei.reward.python_file import load
from lorelei.reward.worker import judge

DATA = {"question": "1 + 1", "answer": "2", "prompt": "Add: 1 + 1", "level": 3}
CHAT = [{"role": "user", "content": "1 + 1"}]


@pytest.fixture
def loaded(tmp_path: Path):
    def loaded(source: str) -> Scorer:
        path = tmp_path / "rewards.py"
        path.write_text(source)
        return load(f"{path}:f")

    return loaded


def called_with(scorer: Scorer, data: Mapping[str, Any]) -> Any:
    (score,) = cast(Sequence[Any], scorer.call([sample(data, "It is 2")]))
    return score


def sample(data: Mapping[str, Any] = DATA, completion: str = "") -> Sample:
    return Sample(data=data, completion=completion)


def test_one_sample_is_given_the_columns_it_names(loaded):
    scorer = loaded(
        "def f(completion, answer, level, other=5): return completion, answer, level, other"
    )
    assert called_with(scorer, DATA) == ("It is 2", "2", 3, 5)


def test_one_sample_with_kwargs_is_given_every_column(loaded):
    scorer = loaded("def f(completion, **columns): return completion, columns")
    assert called_with(scorer, DATA) == ("It is 2", DATA)


def test_one_sample_sees_the_prompt_as_text_or_chat(loaded):
    scorer = loaded("def f(completion, prompt): return prompt")
    assert called_with(scorer, DATA) == "Add: 1 + 1"
    assert called_with(scorer, {**DATA, "prompt": CHAT}) == CHAT


def test_trl_batch_is_called_with_lists_of_one(loaded):
    source = "def f(prompts, completions, **kwargs): return [(prompts, completions, kwargs)]"
    prompts, completions, columns = called_with(loaded(source), DATA)
    assert (prompts, completions) == (["Add: 1 + 1"], ["It is 2"])
    assert columns == {"question": ["1 + 1"], "answer": ["2"], "level": [3]}


def test_trl_batch_gets_chat_completions_for_chat_prompts(loaded):
    source = "def f(completions, prompts, answer): return [(prompts, completions, answer)]"
    prompts, completions, answers = called_with(loaded(source), {**DATA, "prompt": CHAT})
    assert prompts == [CHAT]
    assert completions == [[{"role": "assistant", "content": "It is 2"}]]
    assert answers == ["2"]


@pytest.mark.parametrize("returned", ["1.0", "[1.0, 2.0]", "[]"])
def test_trl_batch_must_return_one_score(loaded, returned):
    (result,) = judge(loaded(f"def f(completions, **kwargs): return {returned}"), [sample()])
    assert result["error"].startswith(
        "raised ValueError: it must return a list of 1, a score for each"
    )


def test_column_that_is_not_there_is_named(loaded):
    (result,) = judge(loaded("def f(completion, solution): return 1.0"), [sample()])
    assert result["error"].startswith("raised ValueError: no column 'solution' in the row; it has")


def test_file_imports_its_neighbours(loaded, tmp_path):
    (tmp_path / "neighbour_of_rewards.py").write_text("VALUE = 0.5")
    source = "import neighbour_of_rewards as n\ndef f(completion): return n.VALUE"
    assert called_with(loaded(source), DATA) == 0.5


@pytest.mark.parametrize("path", ["rewards.py", "rewards.py:", ":f", "rewards.py:a.b"])
def test_path_without_file_and_function_is_refused(path):
    with pytest.raises(ValueError, match=r"reward\.path: .* must be a file and a function"):
        load(path)


class Tensor:
    """As torch's of one element: float() and item() work, and it is no number of Python's."""

    def __init__(self, value: float) -> None:
        self._value = value

    def item(self) -> float:
        return self._value

    def __float__(self) -> float:
        return self._value


@pytest.mark.parametrize(
    "number",
    [
        *(1, 1.0, True, Decimal("1"), Fraction(2, 2), np.bool_(True), np.int8(1), np.float16(1)),
        *(np.longdouble(1), np.array(1.0), np.array([1]), np.array([[True]]), Tensor(1.0)),
        (1.0, {"x": np.array([1])}),
    ],
)
def test_whatever_float_takes_is_a_number(number):
    assert read_score(number)[0] == 1.0


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "None"),
        ("1.0", "str"),
        (b"1", "bytes"),
        (np.array(["1.0"]), "ndarray"),
        (np.array([1.0, 2.0]), "ndarray"),
        ([1.0], "list"),
        (1j, "complex"),
        (Decimal("sNaN"), "Decimal"),
        (Decimal("NaN"), "nan"),
        (np.float64("inf"), "inf"),
        (10**400, "inf"),
        (3.5e38, "3.5e+38 is outside of the range of float32"),
        (-1e300, "-1e+300 is outside of the range of float32"),
        ((1.0, {"x": 1e39}), "metric x 1e+39 is outside of the range of float32"),
        ((1.0, dict.fromkeys(range(101), 1)), "101 metrics, at most 100 are kept"),
        ((1.0, 2.0), "tuple"),
    ],
)
def test_what_is_no_number_of_float32_is_told(value, reason):
    with pytest.raises(NotANumber) as caught:
        read_score(value)
    assert str(caught.value) == reason
