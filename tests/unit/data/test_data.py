"""Prompt sources: pure functions of an index, with a held-out set that stays out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from pydantic import TypeAdapter
from transformers import PreTrainedTokenizerFast

from lorelei.config.task import TaskConfig
from lorelei.data.contract import PromptSource
from lorelei.data.source import make_source

ROWS = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(20)]


@pytest.fixture
def make(tiny_tokenizer: PreTrainedTokenizerFast):
    def make(*, seed: int = 1, eval_size: int = 8, **task: Any) -> PromptSource:
        config = TypeAdapter(TaskConfig).validate_python(task)
        return make_source(config, tiny_tokenizer, seed, eval_size=eval_size)

    return make


def chain_sum(**more: Any) -> dict[str, Any]:
    return {"kind": "reasoning_gym", "name": "chain_sum", **more}


def write_jsonl(folder: Path, rows: list[Any]) -> str:
    path = folder / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def ids(source: PromptSource, indices: range) -> list[str]:
    return [source.prompt(i).id for i in indices]


def questions(source: PromptSource, indices: range) -> list[str]:
    return [source.prompt(i).messages[-1]["content"] for i in indices]


def held_out(source: PromptSource, n: int) -> list[str]:
    return [p.messages[-1]["content"] for p in source.eval_prompts(n)]


# --- order and resuming


def test_a_new_source_gives_the_same_prompts_by_index_in_any_order(make):
    first = make(**chain_sum(size=50))
    run = [first.prompt(i) for i in range(60)]
    resumed = make(**chain_sum(size=50))
    for i in reversed(range(30, 60)):
        again = resumed.prompt(i)
        assert (again.id, again.messages, again.data) == (run[i].id, run[i].messages, run[i].data)
        assert again.tokens.tolist() == run[i].tokens.tolist()


def test_an_epoch_is_a_permutation_and_the_next_epoch_another(make, tmp_path):
    source = make(kind="jsonl", path=write_jsonl(tmp_path, ROWS), eval_size=0)
    first, second = ids(source, range(20)), ids(source, range(20, 40))
    assert sorted(first) == sorted(second) == sorted(f"sums/{i}" for i in range(20))
    assert first != second
    assert first != sorted(first)


def test_another_seed_gives_another_order_and_other_generated_problems(make, tmp_path):
    path = write_jsonl(tmp_path, ROWS)
    one, two = (make(kind="jsonl", path=path, eval_size=0, seed=s) for s in (1, 2))
    assert ids(one, range(20)) != ids(two, range(20))
    one, two = (make(**chain_sum(), seed=s) for s in (1, 2))
    assert not set(questions(one, range(50))) & set(questions(two, range(50)))


# --- held-out prompts


def test_held_out_questions_never_occur_in_training(make):
    # 2 terms of 1 digit: 200 questions in all, of which the held-out items take a good part
    config = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    source = make(**chain_sum(config=config, size=1000), eval_size=100)
    assert len(held_out(source, 100)) == 100
    trained = set(questions(source, range(1000)))
    assert len(trained) > 80
    assert not trained & set(held_out(source, 100))


def test_held_out_rows_and_their_duplicates_never_occur_in_training(make, tmp_path):
    path = write_jsonl(tmp_path, ROWS * 3)
    source = make(kind="jsonl", path=path, eval_size=6)
    assert len(held_out(source, 6)) == 6
    assert not set(questions(source, range(120))) & set(held_out(source, 6))


def test_held_out_prompts_are_the_same_for_every_seed_and_ask(make, tmp_path):
    path = write_jsonl(tmp_path, ROWS)
    for task in (chain_sum(), {"kind": "jsonl", "path": path}):
        one, two = make(**task, seed=1), make(**task, seed=2)
        assert [p.id for p in one.eval_prompts(8)] == [p.id for p in two.eval_prompts(8)]
        assert [p.id for p in one.eval_prompts(3)] == [p.id for p in one.eval_prompts(8)[:3]]


# --- mixtures


def test_a_mixture_follows_its_weights(make):
    mixture = [{"name": "chain_sum", "weight": 3}, {"name": "leg_counting", "weight": 1}]
    source = make(kind="reasoning_gym", mixture=mixture)
    drawn = Counter(name.split("/")[0] for name in ids(source, range(800)))
    # binomial with p = 3/4: 600 +- 12.2; five standard deviations
    assert abs(drawn["chain_sum"] - 600) < 61
    assert drawn.total() == 800 and set(drawn) == {"chain_sum", "leg_counting"}


def test_the_datasets_of_a_mixture_have_their_own_config(make):
    mixture = [{"name": "chain_sum", "config": {"min_terms": 3, "max_terms": 3}}]
    data = make(kind="reasoning_gym", mixture=mixture).prompt(0).data
    assert data["metadata"]["num_terms"] == 3
    assert data["config"] == {"min_terms": 3, "max_terms": 3}


# --- rendering


def test_tokens_are_the_chat_with_a_generation_prompt(make, tiny_tokenizer):
    source = make(**chain_sum(prompt_template="{question} Think.", system_prompt="Be brief."))
    prompt = source.prompt(0)
    question, text = prompt.data["question"], tiny_tokenizer.decode(prompt.tokens)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n{question} Think.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt.tokens.dtype == "int32"
    assert prompt.data["prompt"] == f"{question} Think."


def test_a_tokenizer_without_chat_template_gets_plain_text(tiny_tokenizer):
    plain = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    config = TypeAdapter(TaskConfig).validate_python(chain_sum())
    prompt = make_source(config, plain, 1, eval_size=0).prompt(0)
    assert plain.decode(prompt.tokens) == prompt.data["question"]


@pytest.mark.parametrize("column", ["messages", "prompt"])
def test_chat_rows_are_used_as_they_are(make, tmp_path, column):
    chat = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 1"}]
    path = write_jsonl(tmp_path, [{column: chat, "answer": 2}])
    source = make(kind="jsonl", path=path, eval_size=0)
    assert list(source.prompt(0).messages) == chat
    assert source.prompt(0).data["prompt"] == chat


def test_data_holds_the_columns_as_json_and_the_answer_under_its_name(make, tmp_path):
    path = write_jsonl(tmp_path, [{"question": "1 + 1", "solution": 2, "level": "easy"}])
    data = make(kind="jsonl", path=path, answer_field="solution", eval_size=0).prompt(0).data
    assert data["answer"] == data["solution"] == 2
    assert data["level"] == "easy"
    assert json.loads(json.dumps(data)) == data


def test_generated_data_survives_json(make):
    # arc_agi has tuples, graph_color integer keys
    for name in ("arc_agi", "graph_color"):
        task = {"kind": "reasoning_gym", "name": name, "max_prompt_tokens": 100_000}
        data = make(**task, eval_size=1).prompt(0).data
        assert json.loads(json.dumps(data)) == data


def test_parquet_and_hf_rows_are_those_of_jsonl(make, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    path = write_jsonl(folder, ROWS)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "sums.parquet")
    jsonl = make(kind="jsonl", path=path)
    parquet = make(kind="parquet", path=str(tmp_path / "sums.parquet"))
    hf = make(kind="hf", path=str(folder))
    assert questions(parquet, range(18)) == questions(jsonl, range(18))
    assert questions(hf, range(18)) == questions(jsonl, range(18))
    assert hf.prompt(0).id.startswith(f"{folder}/train/")


# --- error lines


def check_error(call, *parts: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    for part in parts:
        assert part in line


def test_unknown_dataset_names_the_nearest(make):
    task = chain_sum(name="chain_sun")
    check_error(lambda: make(**task), "task.name", "'chain_sun'", "did you mean 'chain_sum'?")


def test_unknown_dataset_option_names_the_nearest(make):
    task = chain_sum(config={"min_term": 2})
    check_error(lambda: make(**task), "task.config", "'min_term'", "did you mean 'min_terms'?")


def test_seed_of_a_dataset_is_not_an_option(make):
    check_error(lambda: make(**chain_sum(config={"seed": 2})), "no option 'seed'")


@pytest.mark.parametrize("value", [-1, "three"])
def test_refused_dataset_option_names_value_and_reason(make, value):
    task = chain_sum(config={"min_terms": value})
    check_error(lambda: make(**task), "task.config: chain_sum refuses", repr(value))


def test_empty_file_is_an_error(make, tmp_path):
    task = {"kind": "jsonl", "path": write_jsonl(tmp_path, [])}
    check_error(lambda: make(**task), "task: sums has no rows")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_missing_file_is_named_in_full(make, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    check_error(lambda: make(kind=kind, path="gone.x"), "task.path", f"{tmp_path / 'gone.x'}")


def test_malformed_line_is_named_by_number(make, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n\n{"question": \n')
    check_error(lambda: make(kind="jsonl", path=str(path)), "line 3 of", "not JSON")


def test_line_that_is_no_object_is_named_by_number(make, tmp_path):
    path = write_jsonl(tmp_path, [ROWS[0], [1]])
    check_error(lambda: make(kind="jsonl", path=path), "line 2 of", "is a list")


def test_file_that_is_no_parquet_is_an_error(make, tmp_path):
    path = write_jsonl(tmp_path, ROWS)
    check_error(lambda: make(kind="parquet", path=path), "task.path", "not a parquet file")


def test_dataset_that_cannot_be_loaded_is_named(make, tmp_path):
    task = {"kind": "hf", "path": str(tmp_path / "nothing"), "split": "train"}
    check_error(lambda: make(**task), "task.path: the dataset", "nothing", "cannot be loaded")


def test_missing_column_of_the_template_names_the_nearest(make, tmp_path):
    task = {"kind": "jsonl", "path": write_jsonl(tmp_path, ROWS), "prompt_template": "{qestion}"}
    parts = ("task.prompt_template", "'qestion'", "did you mean 'question'?")
    check_error(lambda: make(**task), *parts)


def test_missing_answer_column_names_the_nearest(make, tmp_path):
    task = {"kind": "jsonl", "path": write_jsonl(tmp_path, ROWS), "answer_field": "answers"}
    check_error(lambda: make(**task), "task.answer_field", "'answers'", "did you mean 'answer'?")


@pytest.mark.parametrize(
    ("chat", "complaint"),
    [
        ([], "not nothing"),
        ([{"role": "assistant", "content": "2"}], "not an assistant message"),
        ([{"role": "user"}], "needs the strings 'role' and 'content'"),
        (["hello"], "needs the strings 'role' and 'content'"),
    ],
)
def test_malformed_chat_is_named(make, tmp_path, chat, complaint):
    path = write_jsonl(tmp_path, [{"messages": chat, "answer": "2"}])
    check_error(lambda: make(kind="jsonl", path=path), "line 1 of ", "sums.jsonl", complaint)


def test_too_long_prompt_names_problem_length_and_limit(make, tmp_path):
    path = write_jsonl(tmp_path, [*ROWS, {"question": "why? " * 100, "answer": "0"}])
    task = {"kind": "jsonl", "path": path, "max_prompt_tokens": 100}
    parts = (f"task.max_prompt_tokens: the prompt of line 21 of {path} has", "the limit is 100")
    check_error(lambda: make(**task), *parts)
    task = chain_sum(max_prompt_tokens=3)
    check_error(lambda: make(**task), "the prompt of chain_sum/", "the limit is 3")


def test_nothing_left_for_training_is_an_error(make, tmp_path):
    path = write_jsonl(tmp_path, [ROWS[0]] * 10)
    parts = ("task.eval_size: 1 held-out rows leave none of the 10 rows of sums",)
    check_error(lambda: make(kind="jsonl", path=path, eval_size=1), *parts)
    # 1 term of 1 digit: ten questions, all held out
    config = {"min_terms": 1, "max_terms": 1, "min_digits": 1, "max_digits": 1}
    parts = ("task.eval_size", "every question of the 30 items of chain_sum")
    check_error(lambda: make(**chain_sum(config=config, size=30), eval_size=200), *parts)


def test_more_held_out_prompts_than_there_are_is_an_error(make, tmp_path):
    path = write_jsonl(tmp_path, ROWS)
    for task in (chain_sum(), {"kind": "jsonl", "path": path}):
        source = make(**task, eval_size=4)
        check_error(lambda s=source: s.eval_prompts(5), "task.eval_size: 5 held-out", "4 are held")
