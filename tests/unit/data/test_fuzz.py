"""Rows and templates that nobody would write: a clean success or the project's own one line.

See tests/fuzz.py for how many are tried.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from hypothesis import event, given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedTokenizerFast

from lorelei.algo.sft import Sft
from lorelei.config.task import TaskConfig
from lorelei.data.chat import ChatTemplate
from lorelei.data.contract import PromptSource
from lorelei.data.reply import Reply
from lorelei.data.source import make_comparisons, make_examples, make_source
from lorelei.data.tool_call import FORMATS, parse_calls
from lorelei.types import Completion, Turn
from tests.fuzz import fuzz
from tests.tiny_models import CHATML, make_tokenizer

FIELD = re.compile(r"(task|model|env|reward|algo)[a-z_.]*: ")

PIECES = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>", "<tool_call>",
          "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<function=f>", "</function>", "<parameter=a>",
          '{"name": "f", "parameters": {}}', "{", "}", "{{ x }}", "\ud800", "\x00", "\n", "é", " ",
          "a", "7")  # fmt: skip
texts = st.lists(st.sampled_from(PIECES), max_size=5).map("".join) | st.text(max_size=6)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
calls = st.fixed_dictionaries(
    {}, optional={"function": values, "name": texts, "arguments": values, "id": texts}
)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", "?"]), "content": texts},
    optional={"tool_calls": st.lists(calls, max_size=2) | values, "name": texts, "extra": values},
)
chats = st.lists(messages | values, max_size=4) | values
columns = {
    "question": texts | values,
    "answer": scalars | values,
    "messages": chats,
    "prompt": chats | texts,
    "tools": values,
    "completion_answer": texts,
    "completion": chats | texts,
    "label": st.booleans() | values,
    "chosen": chats | texts,
    "rejected": chats | texts,
    "worth": values,
}
odd = st.fixed_dictionaries({}, optional=columns)
# rows that are read to the end, and one fault at most
plain = st.fixed_dictionaries(
    {"question": texts.map(lambda text: f"Q {text}".replace("\ud800", "")), "answer": st.just("1")},
    optional={"tools": values, "other": values},
)
asked = {"role": "user", "content": "Q"}
talks = st.fixed_dictionaries(
    {"prompt": st.lists(messages, max_size=3).map(lambda said: [*said, asked]),
     "answer": st.just("1")}
)  # fmt: skip
compared = st.fixed_dictionaries(
    {"prompt": st.just("Q") | st.just([asked]), "chosen": chats | st.just("1"),
     "rejected": chats | st.just("2"), "completion": texts | st.just("3"), "label": st.booleans()}
)  # fmt: skip
rows = plain | plain | talks | compared | odd
written = rows.map(json.dumps).map(str.encode)
noise = st.binary(max_size=12) | texts.map(lambda text: text.encode("utf-8", "surrogatepass"))
lines = st.lists(written, min_size=1, max_size=3) | st.lists(written | noise, max_size=4)
fragments = st.sampled_from(
    (CHATML, "{# tools #}", "{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ x }}",
     "{{ messages[7].content }}", "{{ 1 / 0 }}", "{{ messages | tojson }}", "{% if", "<|im_end|>",
     "{{ raise_exception('no\nway') }}", "{{ messages[0].content + 1 }}", "{{ tools[0].name }}",
     "{{ tool_calls }}", "<think>\n", "{{ range(3) | join }}", "{{ self() }}", "[TOOL_CALLS]")
)  # fmt: skip
templates = st.just(CHATML) | st.lists(fragments, max_size=4).map("".join)
tasks = st.fixed_dictionaries(
    {},
    optional={
        "prompt_template": st.sampled_from(
            ("{question}", "{answer}", "{question} {answer:>9.3f}", "{question!r}", "{answer:{x}}")
        ),
        "system_prompt": texts,
        "chat_template_kwargs": st.dictionaries(st.sampled_from(["x", "tools", "y"]), scalars),
        "control_tokens": st.sampled_from(["text", "tokens"]),
        "long_prompts": st.sampled_from(["refuse", "drop"]),
        "null_rows": st.sampled_from(["refuse", "drop"]),
        "answer_field": st.sampled_from(["answer", "question", "gone"]),
        "max_prompt_tokens": st.sampled_from([8, 1024]),
    },
)
LEARNT = ("", "answers", "turns", "pairs", "labels")  # of rows; "": they are prompts
TOKENIZER = make_tokenizer()


def tokenizer(template: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=TOKENIZER.backend_tokenizer, eos_token="<|im_end|>", chat_template=template
    )


def own_line(error: Exception) -> None:
    """That an error is ours: one line that names a field, and no library's exception."""
    ours = type(error) is ValueError or type(error).__module__.startswith("lorelei.")
    line = str(error)
    assert ours and "\n" not in line and FIELD.match(line), repr(error)


def task_of(kind: str, path: Path, options: dict[str, Any]) -> Any:
    """The configuration, or None where it is refused."""
    try:
        return TypeAdapter(TaskConfig).validate_python({"kind": kind, "path": str(path), **options})
    except ValidationError:
        return None


def read(task: Any, template: str, learns: str, needs_answer: bool) -> None:
    """Make prompts or examples of a task, and use each once."""
    made = tokenizer(template)
    limits: Any = {"eval_size": 0, "stop_token_ids": (2,), "max_tokens": 2000}
    if learns in ("pairs", "labels"):
        compared = make_comparisons(task, made, 0, **limits, paired=learns == "pairs")
        assert all(map(len, compared.example(0).answers))
        return
    if learns:
        worth = Sft(kind="sft", loss_on="assistant_turns", weight_field="worth")
        algo = worth if learns == "turns" else None
        examples = make_examples(task, made, 0, **limits, algo=algo)
        assert len(examples.example(0).tokens)
        return
    source = make_source(task, made, 0, eval_size=0, needs_answer=needs_answer)
    check_prompts(source, made, task)


def check_prompts(source: PromptSource, made: PreTrainedTokenizerFast, task: Any) -> None:
    """Prompts go through JSON, and their data opens no turns."""
    chat = ChatTemplate(tokenizer=made, stop_token_ids=(2,))
    for index in range(4):
        prompt = source.prompt(index)
        assert json.loads(json.dumps(prompt.data)) is not None
        literal = "<|im_start|>" in (task.system_prompt or "")
        as_text = task.control_tokens == "text" and not literal and not prompt.tools
        if made.chat_template == CHATML and as_text:
            said = [m for m in prompt.messages if m["role"] != "tool"]
            if len(said) == len(prompt.messages):
                assert int((prompt.tokens == 1).sum()) == len(said) + 1
        answer = np.asarray([5, 6, 2], np.int32)
        done = Completion(tokens=answer, logprobs=np.zeros(3, np.float32), versions=((0, 3),),
                          finish_reason="stop")  # fmt: skip
        turn = Turn(prompt=prompt.tokens, completion=done, text="ab")
        if made.chat_template:
            after = [*prompt.messages, chat.spoken(turn), {"role": "user", "content": "<|im_end|>"}]
            chat.follow(after, len(prompt.messages), turn, prompt.tools)


def is_read_or_refused(task: Any, template: str, learns: str, needs_answer: bool) -> None:
    """task: None when its options are refused already."""
    if task is None:
        return
    try:
        read(task, template, learns, needs_answer)
        event("read")
    except ValueError as error:
        own_line(error)
        event(str(error)[:25])


@fuzz(150)
@given(lines, templates, tasks, st.sampled_from(LEARNT), st.booleans())
def test_lines_of_json(
    tmp_path_factory: Any, content: list[bytes], template: str, options: dict[str, Any],
    learns: str, needs_answer: bool,
) -> None:  # fmt: skip
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    path.write_bytes(b"\n".join(content))
    is_read_or_refused(task_of("jsonl", path, options), template, learns, needs_answer)


@fuzz(150)
@given(st.lists(rows, min_size=1, max_size=3), st.binary(max_size=3), st.integers(0, 10**6), tasks)
def test_tables(
    tmp_path_factory: Any, content: list[dict[str, Any]], noise: bytes, at: int,
    options: dict[str, Any],
) -> None:  # fmt: skip
    path = tmp_path_factory.getbasetemp() / "rows.parquet"
    try:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
    except (pyarrow.ArrowException, UnicodeError, OverflowError, TypeError, ValueError):
        return  # pyarrow has no such table
    damaged = bytearray(path.read_bytes())
    place = at % len(damaged)
    damaged[place : place + len(noise)] = noise
    path.write_bytes(damaged)
    is_read_or_refused(task_of("parquet", path, options), CHATML, "", False)


@fuzz(150)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), texts, st.sampled_from(FORMATS))
def test_replies(text: str, prefix: str, format: Any) -> None:
    reply = Reply.of(text, None, prefix)
    before, found = parse_calls(reply.protocol, format)
    assert isinstance(before, str)
    for call in found:
        assert call.error is not None or call.name
        json.dumps(dict(call.arguments))
    assert "</think>" not in reply.answer or "<think>" in text or text.count("</think>") > 1
