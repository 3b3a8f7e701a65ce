"""Reward functions in a user's file: what they are called with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lorelei.reward.contract import Scorer
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
    return scorer(data, "It is 2")


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
    result = judge(loaded(f"def f(completions, **kwargs): return {returned}"), DATA, "")
    assert result["error"].startswith("raised ValueError: one completion needs a list of one score")


def test_column_that_is_not_there_is_named(loaded):
    result = judge(loaded("def f(completion, solution): return 1.0"), DATA, "")
    assert result["error"].startswith("raised ValueError: no column 'solution' in the row; it has")


def test_file_imports_its_neighbours(loaded, tmp_path):
    (tmp_path / "neighbour_of_rewards.py").write_text("VALUE = 0.5")
    source = "import neighbour_of_rewards as n\ndef f(completion): return n.VALUE"
    assert called_with(loaded(source), DATA) == 0.5


@pytest.mark.parametrize("path", ["rewards.py", "rewards.py:", ":f", "rewards.py:a.b"])
def test_path_without_file_and_function_is_refused(path):
    with pytest.raises(ValueError, match=r"reward\.path: .* must be a file and a function"):
        load(path)
