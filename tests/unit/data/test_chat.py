"""What follows an answer: the tokens that were sampled stay, the template's text comes behind."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from lorelei.data.chat import ChatTemplate
from lorelei.types import Completion, Turn
from tests.tiny_models import CHATML

ASK = {"role": "user", "content": "What is 12 + 30?"}
NO = {"role": "user", "content": "No. Again."}
# as Qwen3's: it knows tools, and leaves out the thinking of answers before the last question
FORGETS = (
    "{# tools #}"
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set c = m.content %}"
    "{% if m.role == 'assistant' and loop.index0 < ns.last and '</think>' in c %}"
    "{% set c = c.split('</think>')[1].lstrip() %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ c }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMS = CHATML.replace("message.content", "message.content | trim")
CLOSED = "<|im_end|>\n<|im_start|>user\nNo. Again.<|im_end|>\n<|im_start|>assistant\n"


def template(tokenizer: PreTrainedTokenizerFast, text: str = CHATML) -> ChatTemplate:
    copy = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>", chat_template=text
    )
    return ChatTemplate(tokenizer=copy, stop_token_ids=(2,))


def answered(chat: ChatTemplate, tokens: list[int], messages: list[dict[str, str]]) -> Turn:
    """A turn on the template's own prompt, of tokens that need not be how its text is encoded."""
    return Turn(
        prompt=chat.prompt(messages),
        completion=Completion(
            tokens=np.array(tokens, np.int32),
            logprobs=np.zeros(len(tokens), np.float32),
            versions=((0, len(tokens)),),
            finish_reason="stop",
        ),
        text=str(chat.tokenizer.decode(tokens, skip_special_tokens=True)),
    )


def letters(chat: ChatTemplate, text: str) -> list[int]:
    """A text in single letters: not what the tokenizer makes of it."""
    return [i for c in text for i in chat.tokenizer(c)["input_ids"]]


def follow(chat: ChatTemplate, turn: Turn, *after: dict[str, str]) -> list[int]:
    spoken = {"role": "assistant", "content": turn.text}
    return chat.follow([ASK, spoken, *after], 1, turn).tolist()


@pytest.mark.parametrize("text", [CHATML, TRIMS, FORGETS])
def test_sampled_tokens_are_kept_and_the_templates_text_follows(tiny_tokenizer, text: str) -> None:
    chat = template(tiny_tokenizer, text)
    for spoken in ("The sum is 41", " The sum is 41 "):
        said = letters(chat, spoken)
        assert said != chat.tokenizer(spoken)["input_ids"]
        turn = answered(chat, [*said, 2], [ASK])
        new = chat.tokenizer(CLOSED.removeprefix("<|im_end|>"))["input_ids"]
        assert follow(chat, turn, NO) == [*turn.prompt.tolist(), *said, 2, *new]


def test_an_answer_cut_short_is_closed(tiny_tokenizer) -> None:
    chat = template(tiny_tokenizer)
    said = letters(chat, "The sum")
    turn = answered(chat, said, [ASK])
    new = chat.tokenizer(CLOSED)["input_ids"]
    assert follow(chat, turn, NO) == [*turn.prompt.tolist(), *said, *new]


def test_special_tokens_and_half_characters_in_an_answer_change_nothing(tiny_tokenizer) -> None:
    chat = template(tiny_tokenizer)
    half = chat.tokenizer("é")["input_ids"][:1]
    said = [*letters(chat, "a"), 1, 0, *half, 2]
    turn = answered(chat, said, [ASK])
    assert follow(chat, turn, NO)[: len(turn.prompt) + 5] == [*turn.prompt.tolist(), *said]


def test_a_history_that_the_template_rewrites_is_written_anew(tiny_tokenizer) -> None:
    chat = template(tiny_tokenizer, FORGETS)
    turn = answered(chat, [*letters(chat, "<think>hm</think>\nIt is 41"), 2], [ASK])
    rewritten = [ASK, {"role": "assistant", "content": "It is 41"}, NO]
    assert follow(chat, turn, NO) == chat.prompt(rewritten).tolist()
    # a tool's result is no new question: nothing is left out, and the tokens stay
    result = {"role": "tool", "content": "41"}
    kept = follow(chat, turn, result)
    assert kept[: len(turn.prompt)] == turn.prompt.tolist()
    assert (
        kept[len(turn.prompt) :][: len(turn.completion.tokens)] == turn.completion.tokens.tolist()
    )


def test_a_template_without_tools_is_given_them_as_text(tiny_tokenizer) -> None:
    chat = template(tiny_tokenizer)
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    call = {"function": {"name": "add", "arguments": '{"a": 1}'}}
    text = chat.text(
        [
            ASK,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "2"},
            {"role": "tool", "content": "3"},
        ],
        tools,
    )
    assert text.startswith("<|im_start|>system\nYou may call tools.") and '"name": "add"' in text
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>' in text
    assert (
        "<|im_start|>user\n<tool_response>\n2\n</tool_response>\n"
        "<tool_response>\n3\n</tool_response><|im_end|>" in text
    )


def test_what_a_template_refuses_is_one_line(tiny_tokenizer) -> None:
    chat = template(tiny_tokenizer, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="chat template refuses the messages: roles must"):
        chat.prompt([ASK])
    with pytest.raises(ValueError, match="no chat template"):
        template(tiny_tokenizer, "").prompt([ASK])
