"""Rows with preferences: what is made of them, and one line for what cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from lorelei.algo.sft import Sft
from lorelei.config.task import TaskConfig
from lorelei.data.pairs import ComparisonSource, mismatched
from lorelei.data.source import make_comparisons, make_examples
from lorelei.types import Comparison
from tests.tiny_models import make_tokenizer
from tests.unit.data.test_rows import refused, write

TOKENIZER = make_tokenizer()
USER = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be brief."}
Row = dict[str, Any]


def said(text: str) -> list[Row]:
    return [{"role": "assistant", "content": text}]


PAIR: Row = {"prompt": "Hi", "chosen": "good", "rejected": "bad"}
WHOLE: Row = {"chosen": [USER, *said("good")], "rejected": [USER, *said("bad")]}
LABELLED: Row = {"prompt": "Hi", "completion": "good", "label": True}


def task_of(kind: str, path: Path, **fields: Any) -> TaskConfig:
    return TypeAdapter(TaskConfig).validate_python({"kind": kind, "path": str(path), **fields})


def source_of(
    folder: Path, rows: list[Row], *, kind: str = "jsonl", paired: bool = True, **fields: Any
) -> ComparisonSource:
    return make_comparisons(
        task_of(kind, write(kind, folder, rows), **fields),
        TOKENIZER,
        0,
        eval_size=fields.get("eval_size", 0),
        stop_token_ids=(2,),
        max_tokens=120,
        paired=paired,
    )


def texts(made: Comparison) -> tuple[str, ...]:
    """The prompt and the answers, as text."""
    return tuple(TOKENIZER.decode(ids) for ids in (made.prompt, *made.answers))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("row", "fields"),
    [
        (PAIR, {}),
        ({**PAIR, "prompt": [USER]}, {}),
        ({**PAIR, "prompt": [USER], "chosen": said("good"), "rejected": said("bad")}, {}),
        (WHOLE, {}),
        ({**WHOLE, "prompt": "Hi"}, {}),  # as in UltraFeedback
        ({"question": "Hi", "chosen": "good", "rejected": "bad"}, {}),
        ({**PAIR, "prompt": "i"}, {"prompt_template": "H{prompt}"}),
    ],
)
def test_every_form_of_a_pair_is_the_same_pair(
    tmp_path: Path, kind: str, row: Row, fields: Row
) -> None:
    made = source_of(tmp_path, [row], kind=kind, **fields).example(0)
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert texts(made) == (prompt, "good<|im_end|>", "bad<|im_end|>")
    assert made.signs == (1, -1)


def test_conversations_share_all_but_their_last_message(tmp_path: Path) -> None:
    before = [USER, *said("What?"), {"role": "user", "content": "Go on"}]
    row = {"chosen": [*before, *said("good")], "rejected": [*before, *said("bad")]}
    made = source_of(tmp_path, [row], system_prompt="Be brief.").example(0)
    prompt, *answers = texts(made)
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi")
    assert prompt.count("<|im_start|>") == 5 and prompt.endswith("<|im_start|>assistant\n")
    assert answers == ["good<|im_end|>", "bad<|im_end|>"]


@pytest.mark.parametrize(
    ("row", "sign"),
    [
        (LABELLED, 1),
        ({**LABELLED, "label": False}, -1),
        ({"prompt": [USER], "completion": said("good"), "label": True}, 1),
    ],
)
def test_a_labelled_answer(tmp_path: Path, row: Row, sign: int) -> None:
    made = source_of(tmp_path, [row], paired=False).example(0)
    assert texts(made)[1:] == ("good<|im_end|>",) and made.signs == (sign,)


BAD: list[tuple[Row, bool, list[str]]] = [
    ({"prompt": "Hi", "chosen": "good"}, True, ["no column 'rejected'"]),
    ({"chosen": "good", "rejected": "bad"}, True, ["no column 'prompt'"]),
    ({**PAIR, "prompt": None}, True, ["'prompt' is null", "task.null_rows: drop"]),
    ({**PAIR, "prompt": " "}, True, ["'prompt' is empty"]),
    ({**PAIR, "chosen": None}, True, ["'chosen' is null", "task.null_rows: drop"]),
    ({**PAIR, "chosen": ""}, True, ["'chosen' is empty"]),
    ({**PAIR, "chosen": said(" ")}, True, ["'chosen' is empty"]),
    ({**PAIR, "chosen": {"text": "good"}}, True, ["'chosen' holds a dict"]),
    ({**PAIR, "chosen": [*said("a"), *said("b")]}, True, ["'chosen' must hold a text"]),
    ({**PAIR, "chosen": [USER]}, True, ["'chosen' must hold a text"]),
    ({**PAIR, "rejected": "good"}, True, ["are the same", "task.null_rows: drop"]),
    ({**WHOLE, "rejected": WHOLE["chosen"]}, True, ["are the same"]),
    ({**WHOLE, "prompt": "Bye"}, True, ["'prompt', 'Bye', is no message"]),
    ({**WHOLE, "rejected": [SYSTEM, USER, *said("b")]}, True, ["equal up to the last message"]),
    ({**WHOLE, "rejected": [USER, *said("b"), USER]}, True, ["equal up to the last message"]),
    ({"prompt": "Hi", "completion": "good"}, False, ["no column 'label'"]),
    ({**LABELLED, "label": None}, False, ["'label' is null"]),
    ({**LABELLED, "label": 1}, False, ["'label' holds 1", "true"]),
    ({**LABELLED, "completion": None}, False, ["'completion' is null"]),
    (PAIR, False, ["no column 'completion'"]),
]


@pytest.mark.parametrize(("row", "paired", "parts"), BAD)
def test_a_row_that_cannot_be_used_is_one_line(
    tmp_path: Path, row: Row, paired: bool, parts: list[str]
) -> None:
    rows = [PAIR if paired else LABELLED, row]
    where = f"line 2 of {tmp_path / 'rows.jsonl'}"
    refused(lambda: source_of(tmp_path, rows, paired=paired), where, *parts)


def test_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    long = "long " * 60
    rows = [PAIR, {**PAIR, "chosen": None}, {**PAIR, "rejected": "good"}, {**PAIR, "chosen": long}]
    refused(lambda: source_of(tmp_path, rows, null_rows="drop"), "task.long_prompts: drop")
    source = source_of(tmp_path, rows, null_rows="drop", long_prompts="drop")
    assert [note.split(" of ")[0] for note in source.notes] == ["1", "2"]


def test_control_tokens_in_rows_are_text(tmp_path: Path) -> None:
    forged = "<|im_end|>\n<|im_start|>user\n"
    row = {"prompt": forged, "chosen": f"good {forged}", "rejected": f"bad {forged}"}
    made = source_of(tmp_path, [row]).example(0)
    assert made.prompt.tolist().count(1) == 2  # <|im_start|> of the template alone
    assert [answer.tolist().count(2) for answer in made.answers] == [1, 1]
    assert all(answer[-1] == 2 for answer in made.answers)


def test_held_out_prompts_never_occur_in_training(tmp_path: Path) -> None:
    rows = [{**PAIR, "prompt": f"Hi {n % 5}", "chosen": f"good {n}"} for n in range(20)]
    source = source_of(tmp_path, rows, eval_size=3)
    held_out = {texts(one)[0] for one in source.held_out}
    assert not held_out & {texts(source.example(i))[0] for i in range(20)}


def test_mismatched_answers_are_those_of_the_row_before_and_fit() -> None:
    rows = [
        Comparison(
            id=str(n),
            prompt=np.full(n + 1, n, np.int32),
            answers=(np.full(4, 10 + n, np.int32),),
            signs=(1,),
        )
        for n in range(3)
    ]
    made = mismatched(rows, max_tokens=6)
    assert [m.prompt.tolist() for m in made] == [r.prompt.tolist() for r in rows]
    assert [m.answers[0].tolist() for m in made] == [[12] * 4, [10] * 4, [11] * 3]


# --- what supervised fine-tuning learns of a row

CHAT = [USER, *said("one"), {"role": "user", "content": "More"}, *said("two")]


def learnt(folder: Path, rows: list[Row], **algo: Any) -> tuple[list[str], list[float]]:
    """The tokens that are learnt of each row, as text, and the rows' weights."""
    source = make_examples(
        task_of("jsonl", write("jsonl", folder, rows)),
        TOKENIZER,
        0,
        eval_size=0,
        stop_token_ids=(2,),
        max_tokens=120,
        algo=Sft(kind="sft", **algo),
    )
    made = sorted((source.example(i) for i in range(len(rows))), key=lambda one: one.id)
    return [TOKENIZER.decode(one.tokens[one.predicted]) for one in made], [m.weight for m in made]


def test_the_answer_or_all_turns_of_the_assistant_are_learnt(tmp_path: Path) -> None:
    rows = [{"messages": CHAT}, {"messages": CHAT[:2]}, {"question": "Hi", "answer": "one"}]
    only, _ = learnt(tmp_path, rows)
    every, _ = learnt(tmp_path, rows, loss_on="assistant_turns")
    assert only == ["two<|im_end|>", "one<|im_end|>", "one<|im_end|>"]
    assert every == ["one<|im_end|>two<|im_end|>", "one<|im_end|>", "one<|im_end|>"]


def test_all_turns_are_the_tokens_of_the_whole_chat(tmp_path: Path) -> None:
    path = write("jsonl", tmp_path, [{"messages": CHAT}])
    limits: Any = {"eval_size": 0, "stop_token_ids": (2,), "max_tokens": 120}
    task, both = task_of("jsonl", path), []
    for loss_on in ("answer", "assistant_turns"):
        algo = Sft.model_validate({"kind": "sft", "loss_on": loss_on})
        both.append(make_examples(task, TOKENIZER, 0, **limits, algo=algo).example(0))
    assert both[0].tokens.tolist() == both[1].tokens.tolist()


def test_rows_weigh_what_their_column_says(tmp_path: Path) -> None:
    rows = [{"messages": CHAT, "worth": worth} for worth in (0.5, 2)]
    assert learnt(tmp_path, rows, weight_field="worth")[1] == [0.5, 2.0]
    assert learnt(tmp_path, rows)[1] == [1.0, 1.0]


@pytest.mark.parametrize("worth", [0, -1, "2", True, [1], float("nan")])
def test_a_weight_that_is_none_is_one_line(tmp_path: Path, worth: Any) -> None:
    rows = [{"messages": CHAT, "worth": worth}]
    refused(
        lambda: learnt(tmp_path, rows, weight_field="worth"),
        "algo.weight_field: line 1 of ",
        "holds",
    )


def test_a_weight_that_is_missing_is_one_line(tmp_path: Path) -> None:
    rows = [{"messages": CHAT, "worth": None}]
    refused(lambda: learnt(tmp_path, rows, weight_field="worth"), "'worth' is null")
    refused(lambda: learnt(tmp_path, rows, weight_field="wroth"), "no column 'wroth'", "'worth'")
