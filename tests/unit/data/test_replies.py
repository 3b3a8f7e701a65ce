"""What a model wrote, as people, protocols and rewards read it: thinking and tool calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedTokenizerFast

from lorelei.config.task import TaskConfig
from lorelei.data.chat import ChatTemplate
from lorelei.data.reply import Reply, decoder_of
from lorelei.data.source import make_examples, make_source
from lorelei.data.tool_call import FORMATS, Format, format_call, parse_calls
from lorelei.types import Completion, Turn
from tests.tiny_models import CHATML, make_tokenizer

ASK = {"role": "user", "content": "1 + 1?"}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "string"}},
        },
    },
}
GIVEN = {"a": 1, "b": "two\nlines"}

# as the models' own templates: how they teach tools and write calls and results
HEAD = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}{% endfor %}"
    "<|im_end|>\n{% endif %}"
)
TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}CALL{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WRITES = {
    "hermes": '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}\n</tool_call>",
    "json": '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}',
    "tags": "<tool_call>\n<function={{ c.function.name }}>\n{% for k, v in "
    "c.function.arguments.items() %}<parameter={{ k }}>\n{{ v }}\n</parameter>\n{% endfor %}"
    "</function>\n</tool_call>",
    "mistral": '[TOOL_CALLS][{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}]",
}
# calls only as messages with calls, behind roles that alternate, with ids of nine characters
MISTRAL = (
    "{% set ns = namespace(user=true) %}{% if tools %}[TOOLS]{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if m.tool_call_id | length != 9 %}{{ raise_exception('nine characters') }}{% endif %}"
    "[RESULT]{{ m.content }}[/RESULT]{% elif m.tool_calls is defined %}[TOOL_CALLS]["
    "{% for c in m.tool_calls %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, '
    '"id": "{{ c.id }}"}{% endfor %}]<|im_end|>'
    "{% else %}{% if (m.role == 'user') != ns.user %}{{ raise_exception('alternate') }}{% endif %}"
    "{% set ns.user = not ns.user %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endif %}{% endfor %}"
)


def tokenizer(template: str = CHATML, special: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer().backend_tokenizer,
        eos_token="<|im_end|>",
        chat_template=template,
    )
    if special:
        made.add_special_tokens({"additional_special_tokens": list(special)})
    return made


def chat_of(template: str = CHATML, **more: Any) -> ChatTemplate:
    return ChatTemplate(tokenizer=tokenizer(template), stop_token_ids=(2,), **more)


def turn_of(chat: ChatTemplate, text: str, messages: list[Any] | None = None) -> Turn:
    tokens = np.asarray([*chat.tokenizer(text)["input_ids"], 2], np.int32)
    done = Completion(
        tokens=tokens,
        logprobs=np.zeros(len(tokens), np.float32),
        versions=((0, len(tokens)),),
        finish_reason="stop",
    )
    prompt = chat.prompt(messages or [ASK])
    return Turn(prompt=prompt, completion=done, text=decoder_of(chat.tokenizer)(tokens))


# --- thinking


@pytest.mark.parametrize(
    ("text", "prefix", "thinking", "answer"),
    [
        ("It is 2", "", "", "It is 2"),
        (" It is 2 ", "", "", " It is 2 "),
        ("<think>\nhm\n</think>\n\nIt is 2", "", "hm", "It is 2"),
        ("hm</think>It is 2", "<think>\n", "hm", "It is 2"),
        ("hm</think>It is 2", "", "hm", "It is 2"),  # nobody saw who opened it
        ("It is 2", "<think>\n\n</think>\n\n", "", "It is 2"),  # thinking turned off
        ("hm, so", "<think>\n", "hm, so", ""),  # cut short
        ("<think>hm, so", "", "hm, so", ""),
        ("<think>a</think>b <think>c</think>d", "", "a\nc", "b d"),
        ("[THINK]hm[/THINK]2", "", "hm", "2"),
        ("hm[/THINK]2", "[THINK]", "hm", "2"),
        ("<think>a [/THINK] b</think>2", "", "a [/THINK] b", "2"),
        ("<|channel|>analysis<|message|>hm<|channel|>final<|message|>2", "", "hm", "2"),
    ],
)
def test_thinking_and_the_answer_behind_it(
    text: str, prefix: str, thinking: str, answer: str
) -> None:
    reply = Reply.of(text, None, prefix)
    assert (reply.text, reply.thinking, reply.answer) == (text, thinking, answer)
    assert reply.columns() == {
        "completion_answer": answer,
        "completion_thinking": thinking,
        "completion_prefix": prefix,
    }


OPENS = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
CLOSES = CHATML.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}",
)


@pytest.mark.parametrize(
    ("template", "variables", "prefix"),
    [
        (CHATML, {}, ""),
        (OPENS, {}, "<think>\n"),
        (CLOSES, {}, ""),
        (CLOSES, {"enable_thinking": True}, ""),
        (CLOSES, {"enable_thinking": False}, "<think>\n\n</think>\n\n"),
    ],
)
def test_what_the_template_has_begun_an_answer_with_is_known(
    template: str, variables: dict[str, Any], prefix: str
) -> None:
    chat = chat_of(template, variables=variables)
    assert chat.reply(turn_of(chat, "hm</think>2")).prefix == prefix


@pytest.mark.parametrize("template", [CHATML, OPENS])
def test_no_call_is_read_inside_of_thinking(template: str) -> None:
    chat = chat_of(template)
    call = format_call("add", {"a": 1})
    for text in (f"<think>{call}</think>2", f"{call}</think>2", f"<think>{call}"):
        assert chat.calls(turn_of(chat, text), [ADD])[1] == []
    (made,) = chat.calls(turn_of(chat, f"<think>{call}</think>{call}"), [ADD])[1]
    assert made.arguments == {"a": 1}


def test_tags_of_thinking_that_are_control_tokens_stay_in_the_text() -> None:
    made = tokenizer(special=("[THINK]", "[/THINK]", "[TOOL_CALLS]"))
    chat = ChatTemplate(tokenizer=made, stop_token_ids=(2,))
    turn = turn_of(chat, "[THINK]hm[/THINK]2[TOOL_CALLS]x")
    reply = chat.reply(turn)
    assert turn.text == "[THINK]hm[/THINK]2x"
    assert (reply.thinking, reply.answer) == ("hm", "2x")
    assert reply.protocol == "2[TOOL_CALLS]x"


def test_the_beginning_that_the_template_wrote_stays_in_the_conversation() -> None:
    chat = chat_of(OPENS)
    turn = turn_of(chat, "hm</think>2")
    assert chat.spoken(turn) == {"role": "assistant", "content": "<think>\nhm</think>2"}
    said = chat.follow([ASK, chat.spoken(turn), ASK], 1, turn).tolist()
    known = [*turn.prompt.tolist(), *turn.completion.tokens.tolist()]
    assert said[: len(known)] == known


# --- tool calls


@pytest.mark.parametrize("format", FORMATS)
def test_a_format_is_known_by_how_the_template_writes_a_call(format: Format) -> None:
    template = HEAD + TURNS.replace("CALL", WRITES[format])
    chat = chat_of(template)
    assert chat.tool_format() == format
    chat.check_tools([ADD])
    text = format_call("add", GIVEN, format)
    before, (call,) = chat.calls(turn_of(chat, text), [ADD])
    assert (before, call.name, dict(call.arguments), call.error) == ("", "add", GIVEN, None)


@pytest.mark.parametrize(
    ("words", "format"),
    [
        ("write <tool_call>{...}</tool_call>", "hermes"),
        ('answer with {"name": its name, "parameters": an object}', "json"),
        ("answer with {\\'name\\': name, \\'parameters\\': object}", "json"),
        ("write <tool_call><function=NAME><parameter=KEY>", "tags"),
        ("write [TOOL_CALLS]", "mistral"),
    ],
)
def test_a_format_is_known_by_what_the_template_tells_the_model(words: str, format: str) -> None:
    assert chat_of("{% if tools %}" + words + "{% endif %}" + CHATML).tool_format() == format


@pytest.mark.parametrize(
    "writes",
    [
        "<｜tool▁call▁begin｜>{{ c.function.name }}",
        "<tool_call>{{ c.function.name }}<arg_key>a</arg_key></tool_call>",
        "<|channel|>commentary to={{ c.function.name }}",
        "",
    ],
)
def test_a_format_that_is_not_known_is_refused_by_name(writes: str) -> None:
    chat = chat_of(HEAD + TURNS.replace("CALL", writes))
    with pytest.raises(
        ValueError, match=r"^model: the chat template of .* not known here"
    ) as caught:
        chat.check_tools([ADD])
    assert "\n" not in str(caught.value)


OPEN, CLOSE = "<tool_call>", "</tool_call>"


@pytest.mark.parametrize(
    ("format", "text", "found"),
    [
        ("hermes", f'So: {OPEN}{{"name": "add", "arguments": {{"a": 1}}}}{CLOSE}', {"a": 1}),
        ("hermes", f"{OPEN}{{no}}{CLOSE}", "the call is not JSON"),
        ("hermes", f'{OPEN}{{"arguments": {{}}}}{CLOSE}', "the call must be"),
        ("hermes", f'{OPEN}{{"name": "add", "arguments": [1]}}{CLOSE}', "must be an object"),
        ("hermes", f'{OPEN}{{"name": "add"', None),
        ("json", '{"name": "add", "parameters": {"a": 1}}', {"a": 1}),
        ("json", ' <|python_tag|>{"name": "add", "parameters": {"a": 1}}<|eom_id|>', {"a": 1}),
        ("json", '{"name": "add", "arguments": {"a": 1}}', {"a": 1}),
        ("json", '{"answer": 2}', None),  # an answer in JSON
        ("json", "It is 2", None),
        ("json", 'I use {"name": "add", "parameters": {}}', None),
        ("json", '{"name": "add", "parameters": {"a": ', "the call is not JSON"),
        ("json", "<|python_tag|>search.call(1)", "the call is not JSON"),
        ("tags", f"{OPEN}\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>", {"a": 1}),
        ("tags", "<function=add><parameter=b>1</parameter></function>", {"b": "1"}),
        ("tags", '<function=add>{"a": 1}</function>', {"a": 1}),
        ("tags", "<function=add><parameter=a>x</parameter></function>", {"a": "x"}),
        ("tags", "<function=add><parameter=a>1</function>", "is not closed"),
        ("tags", "<function=add><parameter=a>1</parameter>", "the call must be"),
        ("mistral", '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]', {"a": 1}),
        ("mistral", '[TOOL_CALLS]add[ARGS]{"a": 1}', {"a": 1}),
        ("mistral", '[TOOL_CALLS]add[CALL_ID]123456789[ARGS]{"a": 1}', {"a": 1}),
        ("mistral", '[TOOL_CALLS][{"name": "add", "arg', "the call is not JSON"),
        ("mistral", "It is 2", None),
    ],
)
def test_calls_are_read(format: Format, text: str, found: Any) -> None:
    _, calls = parse_calls(text, format, [ADD])
    if found is None:
        assert calls == []
    elif isinstance(found, str):
        assert found in str(calls[0].error)
    else:
        assert [(c.name, dict(c.arguments), c.error) for c in calls] == [("add", found, None)]


def test_several_calls_are_all_read() -> None:
    two = [("add", {"a": 1}), ("add", {"a": 2})]
    texts = {
        "json": '{"name": "add", "parameters": {"a": 1}}; {"name": "add", "parameters": {"a": 2}}',
        "mistral": '[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]add[ARGS]{"a": 2}',
        "tags": "\n".join(format_call(name, given, "tags") for name, given in two),
        "hermes": "\n".join(format_call(name, given, "hermes") for name, given in two),
    }
    for format in FORMATS:
        _, calls = parse_calls(texts[format], format, [ADD])
        assert [(c.name, dict(c.arguments)) for c in calls] == two


def test_a_template_that_takes_calls_only_as_such_gets_them_behind_the_sampled_tokens() -> None:
    made = tokenizer(MISTRAL, special=("[TOOL_CALLS]", "[RESULT]"))
    chat = ChatTemplate(tokenizer=made, stop_token_ids=(2,))
    chat.check_tools([ADD])
    turn = turn_of(chat, '[TOOL_CALLS][{"name": "add",  "arguments": {"a": 1}}]')
    result = {"role": "tool", "name": "add", "content": "2", "tool_call_id": "call00000"}
    tokens = chat.follow([ASK, chat.spoken(turn), result], 1, turn, [ADD]).tolist()
    known = [*turn.prompt.tolist(), *turn.completion.tokens.tolist()]
    assert tokens[: len(known)] == known
    assert made.decode(tokens[len(known) :]) == "[RESULT]2[/RESULT]"


# --- variables of the template


def task_of(path: Path, **fields: Any) -> Any:
    return TypeAdapter(TaskConfig).validate_python({"kind": "jsonl", "path": str(path), **fields})


def test_variables_reach_the_template_wherever_it_is_applied(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "Hi", "answer": "2"}))
    task = task_of(path, chat_template_kwargs={"enable_thinking": False})
    off, made = "<think>\n\n</think>\n\n", tokenizer(CLOSES)
    prompt = make_source(task, made, 0, eval_size=0).prompt(0)
    assert made.decode(prompt.tokens).endswith(off)
    chat = chat_of(CLOSES, variables=task.chat_template_kwargs)
    assert chat.text([ASK]).endswith(off)
    opened = "{% if message.role == 'assistant' and not enable_thinking %}" + off + "{% endif %}"
    learns = CLOSES.replace("{{ message.content }}", opened + "{{ message.content }}")
    examples = make_examples(
        task, tokenizer(learns), 0, eval_size=0, stop_token_ids=(2,), max_tokens=500
    )
    example = examples.example(0)
    assert made.decode(example.tokens).endswith(off + "2<|im_end|>")


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"enable_thinkin": False}, "'enable_thinkin' is no variable of the model's chat template"),
        ({"tools": []}, "'tools' is no variable that can be given"),
        ({"add_generation_prompt": False}, "no variable that can be given"),
        ({"a b": 1}, "no variable that can be given"),
    ],
)
def test_a_variable_without_effect_is_refused(
    tmp_path: Path, variables: dict[str, Any], reason: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "Hi", "answer": "2"}))
    with pytest.raises((ValueError, ValidationError), match=reason):
        task = task_of(path, chat_template_kwargs=variables)
        make_source(task, tokenizer(CLOSES), 0, eval_size=0)


# --- messages of rows


KNOWS = HEAD + TURNS.replace("CALL", WRITES["hermes"])
CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}],
}
RESULT = {"role": "tool", "content": "2", "name": "add", "tool_call_id": None}


def rows_of(tmp_path: Path, *rows: Any) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("template", [CHATML, KNOWS])
@pytest.mark.parametrize("tools", [[ADD], json.dumps([ADD]), [ADD["function"]]])
def test_calls_and_tools_of_rows_are_written(tmp_path: Path, template: str, tools: Any) -> None:
    row = {"messages": [ASK, CALLED, RESULT], "tools": tools, "answer": "2"}
    task, made = task_of(rows_of(tmp_path, row), max_prompt_tokens=4000), tokenizer(template)
    text = made.decode(make_source(task, made, 0, eval_size=0).prompt(0).tokens)
    assert '{"name": "add", "arguments": {"a": 1}}' in text
    assert '"description": "Add."' in text and "\n2" in text


def test_an_answer_with_calls_is_learnt(tmp_path: Path) -> None:
    row = {"messages": [ASK, CALLED], "tools": [ADD]}
    task, made = task_of(rows_of(tmp_path, row), max_prompt_tokens=4000), tokenizer(KNOWS)
    examples = make_examples(task, made, 0, eval_size=0, stop_token_ids=(2,), max_tokens=4000)
    learnt = examples.example(0).tokens[examples.example(0).predicted]
    assert made.decode(learnt) == format_call("add", {"a": 1}) + "<|im_end|>"


def test_a_message_has_the_fields_that_the_template_writes(tmp_path: Path) -> None:
    named = CHATML.replace("{{ message.role }}", "{{ message.role }} {{ message.name }}")
    row = {"messages": [{**ASK, "name": "Ada", "weight": None}], "answer": "2"}
    task = task_of(rows_of(tmp_path, row))
    made = tokenizer(named)
    assert "user Ada" in made.decode(make_source(task, made, 0, eval_size=0).prompt(0).tokens)
    with pytest.raises(ValueError, match=r"line 1 of .* field 'name', which the model's chat"):
        make_source(task, tokenizer(), 0, eval_size=0)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [{**ASK, "weight": 0}]}, "field 'weight'"),
        ({"messages": [ASK], "tools": "none"}, "column 'tools' holds 'none'"),
        ({"messages": [ASK], "tools": [{"type": "function"}]}, "column 'tools' holds"),
        ({"messages": [ASK, {**CALLED, "tool_calls": [1]}, RESULT]}, "'tool_calls'"),
        ({"messages": [ASK, {**CALLED, "tool_calls": [{"function": {"name": "f", "arguments":
            "{"}}]}, RESULT]}, "are not JSON"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "needs the strings"),
        ({"messages": [{"role": "user", "content": " "}]}, "is empty"),
    ],
)  # fmt: skip
def test_what_the_template_would_not_write_is_refused(
    tmp_path: Path, row: dict[str, Any], reason: str
) -> None:
    task = task_of(rows_of(tmp_path, {**row, "answer": "2"}))
    with pytest.raises(ValueError, match=reason) as caught:
        make_source(task, tokenizer(), 0, eval_size=0)
    assert "\n" not in str(caught.value)
