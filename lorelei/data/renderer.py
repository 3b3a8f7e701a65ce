"""The renderer: a row of a dataset becomes chat messages, and these become token ids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter
from typing import TYPE_CHECKING, Any

import numpy as np

from lorelei.config.errors import nearest, shown
from lorelei.data.chat import is_message
from lorelei.types import Prompt

if TYPE_CHECKING:
    from lorelei.model.tokenizer import Tokenizer

Row = Mapping[str, Any]
Messages = tuple[Mapping[str, str], ...]

CHAT_COLUMNS = ("messages", "prompt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Renderer:
    """How the rows of one task become prompts."""

    tokenizer: Tokenizer
    prompt_template: str = "{question}"
    system_prompt: str | None = None
    answer_field: str = "answer"
    max_prompt_tokens: int = 1024

    def messages(self, row: Row, where: str) -> Messages:
        """Chat messages of a row: its own, or the template's text behind the system prompt."""
        chat = chat_of(row)
        if chat is not None:
            return _checked_chat(chat, where)
        text = _fill(self.prompt_template, row, where)
        user = {"role": "user", "content": text}
        if self.system_prompt is None:
            return (user,)
        return ({"role": "system", "content": self.system_prompt}, user)

    def prompt(self, id: str, row: Row) -> Prompt:
        """The row as a prompt.

        With a chat template the tokens end with a generation prompt; without one they are those
        of the plain text. Raises ValueError for a missing column, a malformed chat and a prompt
        longer than `max_prompt_tokens`.
        """
        messages = self.messages(row, id)
        if self.tokenizer.chat_template:
            ids = self.tokenizer.apply_chat_template(
                [dict(m) for m in messages], add_generation_prompt=True, return_dict=False
            )
        else:
            ids = self.tokenizer("\n\n".join(m["content"] for m in messages))["input_ids"]
        if len(ids) > self.max_prompt_tokens:
            raise ValueError(
                f"task.max_prompt_tokens: the prompt of {id} has {len(ids)} tokens, the limit is "
                f"{self.max_prompt_tokens}; raise it or make such problems shorter"
            )
        data = self._data(row, messages, id)
        return Prompt(id=id, tokens=np.asarray(ids, np.int32), messages=messages, data=data)

    def _data(self, row: Row, messages: Messages, where: str) -> dict[str, Any]:
        """What the reward needs, as JSON values: the columns, `answer` and `prompt`.

        `prompt` is the list of chat messages if the row brought one, else the user's text.
        """
        if self.answer_field not in row:
            raise _missing("task.answer_field", self.answer_field, row, where)
        prompt = messages[-1]["content"] if chat_of(row) is None else list(messages)
        data = {**row, "answer": row[self.answer_field], "prompt": prompt}
        # Through JSON once, so that a reward sees the same values in a fresh and a resumed run.
        return json.loads(json.dumps(data, default=str))


def chat_of(row: Row) -> list[Any] | None:
    """The chat messages a row brings along, if it does."""
    return next((row[c] for c in CHAT_COLUMNS if isinstance(row.get(c), list)), None)


def question_key(messages: Messages) -> str:
    """Equal for equal questions; the system prompt, the same everywhere, is part of it."""
    return "\0".join(f"{m['role']}\0{m['content'].strip()}" for m in messages)


def _checked_chat(chat: list[Any], where: str) -> Messages:
    for message in chat:
        if not is_message(message):
            raise ValueError(
                f"task: {where} has the chat message {shown(message)}; "
                "each needs the strings 'role' and 'content'"
            )
    if not chat or chat[-1]["role"] == "assistant":
        raise ValueError(
            f"task: the chat of {where} must end with a message to answer, "
            f"not {'nothing' if not chat else 'an assistant message'}; "
            "drop the assistant's last message from the dataset"
        )
    return tuple({"role": m["role"], "content": m["content"]} for m in chat)


def _fill(template: str, row: Row, where: str) -> str:
    for _, field, _, _ in Formatter().parse(template):
        if field is not None and field not in row:
            raise _missing("task.prompt_template", field, row, where)
    return template.format(**row)


def _missing(field: str, column: str, row: Row, where: str) -> ValueError:
    return ValueError(f"{field}: {where} has no column {column!r}; {nearest(column, row)}")
