"""The renderer: a row of a dataset becomes chat messages, and these become token ids."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from lorelei.config.errors import nearest, shown
from lorelei.config.task import PROMPT_TEMPLATE
from lorelei.data.chat import ChatTemplate, TemplateRefused
from lorelei.data.messages import Message, arguments_of, is_message, read_tools, without_nulls
from lorelei.data.reply import COLUMNS
from lorelei.types import Prompt

if TYPE_CHECKING:
    from lorelei.model.tokenizer import Tokenizer

Row = Mapping[str, Any]
Messages = tuple[Message, ...]

CHAT_COLUMNS = ("messages", "prompt")
# fields of a message that carry no text of their own, whether the template writes them or not
_PLUMBING = frozenset({"role", "content", "tool_calls", "tool_call_id"})


class LongRow(ValueError):
    """A row with more tokens than are allowed."""


class NullRow(ValueError):
    """A row without a value where one is needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Renderer:
    """How the rows of one task become prompts."""

    tokenizer: Tokenizer
    prompt_template: str = PROMPT_TEMPLATE
    system_prompt: str | None = None
    answer_field: str = "answer"
    max_prompt_tokens: int = 1024
    variables: Mapping[str, Any] = field(default_factory=dict[str, Any])  # of the chat template
    control_tokens: Literal["text", "tokens"] = "text"
    # whether the reward needs answers; else whether any row has one: then each must
    answers: Literal["needed", "given", "none"] = "needed"
    own_tools: bool = True  # False: the environment has tools, and rows must not
    chat: ChatTemplate = field(init=False)

    def __post_init__(self) -> None:
        template = ChatTemplate(
            tokenizer=self.tokenizer,
            stop_token_ids=(),
            variables=self.variables,
            control_tokens=self.control_tokens,
        )
        object.__setattr__(self, "chat", template)

    def chat_of(self, row: Row) -> list[Any] | None:
        """The chat that a row brings along, if it does and no prompt template was given."""
        if self.prompt_template != PROMPT_TEMPLATE:
            return None
        return next((row[c] for c in CHAT_COLUMNS if isinstance(row.get(c), list)), None)

    def messages(self, row: Row, where: str) -> Messages:
        """Chat messages of a row: its own, or the template's text, behind the system prompt."""
        chat = self.chat_of(row)
        if chat is not None:
            return self.with_system(self.checked(chat, where), where)
        user = {"role": "user", "content": self._fill(row, where)}
        return self.with_system((user,), where)

    def with_system(self, chat: Messages, where: str) -> Messages:
        """The chat behind the system prompt of the configuration."""
        if self.system_prompt is None:
            return chat
        if chat and chat[0]["role"] == "system":
            raise ValueError(
                f"task.system_prompt: {where} has a chat with a system message of its own; remove "
                "one of the two"
            )
        literal = self.system_prompt
        system = self.chat.controls.composed(literal, literal, literal)
        return ({"role": "system", "content": system}, *chat)

    def checked(self, chat: Sequence[Any], where: str) -> Messages:
        """A row's chat that ends with a message to answer. Raises ValueError."""
        found = self.checked_messages(chat, where)
        if not found or found[-1]["role"] == "assistant":
            raise ValueError(
                f"task: the chat of {where} must end with a message to answer, "
                f"not {'nothing' if not found else 'an assistant message'}; "
                "drop the assistant's last message from the dataset, or name the columns of the "
                "prompt in task.prompt_template"
            )
        if not (found[-1].get("content") or "").strip():
            raise NullRow(f"task: the last message of the chat of {where} is empty; fill it in")
        return found

    def checked_messages(self, chat: Sequence[Any], where: str) -> Messages:
        """Messages with all that the template writes of them. Raises ValueError for others."""
        source = self.chat.source()
        found: list[Message] = []
        for message in chat:
            if not is_message(message):
                raise ValueError(
                    f"task: {where} has the chat message {shown(message)}; "
                    "each needs the strings 'role' and 'content', or 'tool_calls'"
                )
            plain = without_nulls(message)
            for key in plain.keys() - _PLUMBING:
                known = re.search(rf"\b{re.escape(key)}\b", source) is not None
                if not (known or (key == "name" and plain["role"] == "tool")):
                    raise ValueError(
                        f"task: {where} has a chat message with the field {shown(key)}, which the "
                        "model's chat template does not write; remove it from the dataset"
                    )
            if plain.get("tool_calls") and not source:
                raise ValueError(
                    f"task: {where} has a chat message with 'tool_calls', and the model has no "
                    "chat template to write them with; remove them, or use an instruct model"
                )
            for call in plain.get("tool_calls") or ():
                arguments_of(call)
            found.append(plain)
        return tuple(found)

    def tools(self, row: Row, where: str) -> list[dict[str, Any]]:
        """The tools that a row brings along. Raises ValueError for what is none."""
        held = row.get("tools")
        if not held or (self.chat_of(row) is None and _names(self.prompt_template, "tools")):
            return []
        tools = read_tools(held)
        if tools is None:
            if self.chat_of(row) is None:  # a column like any other
                return []
            raise ValueError(
                f"task: {where}: the column 'tools' holds {shown(held)}, which is not OpenAI's "
                "list of functions; correct or rename it"
            )
        if not self.own_tools:
            raise ValueError(
                f"env.tools: {where} has the column 'tools', with functions that the environment "
                "cannot call; rename it, or give these functions in env.tools"
            )
        return tools

    def prompt(self, id: str, row: Row, where: str | None = None) -> Prompt:
        """The row as a prompt. where: what errors call it; None: by its id.

        With a chat template the tokens end with a generation prompt; without one they are those
        of the plain text. Raises ValueError for a missing column, a malformed chat and a prompt
        longer than `max_prompt_tokens`.
        """
        where = where or id
        messages, tools = self.messages(row, where), self.tools(row, where)
        data = self._data(row, messages, where)
        tokens = self.tokens(messages, tools, where)
        if len(tokens) > self.max_prompt_tokens:
            raise self.too_long(where, len(tokens))
        return Prompt(id=id, tokens=tokens, messages=messages, tools=tuple(tools), data=data)

    def tokens(self, messages: Messages, tools: Sequence[Any], where: str) -> np.ndarray:
        """[P] the prompt's token ids. Raises ValueError naming the row."""
        if not self.tokenizer.chat_template:
            if tools:
                raise ValueError(
                    f"task: {where} has the column 'tools', and the model has no chat template to "
                    "write them with; remove it, or use an instruct model"
                )
            return np.asarray(self.plain_ids(messages), np.int32)
        try:
            return self.chat.prompt(messages, tools)
        except TemplateRefused as refused:
            raise self.refusal(refused, messages, tools, where) from refused

    def refusal(
        self, refused: Exception, messages: Messages, tools: Sequence[Any], where: str
    ) -> ValueError:
        """What to say of a row that the chat template refuses."""
        if self.system_prompt is not None:
            try:
                self.chat.prompt(messages[1:], tools)
            except ValueError:
                pass  # not the system prompt's fault
            else:
                return ValueError(
                    f"task.system_prompt: {refused}; put it into task.prompt_template"
                )
        return ValueError(f"model: {where}: {refused}")

    def plain_ids(self, messages: Messages) -> list[int]:
        """Token ids of the messages for a model without a chat template."""
        text = "\n\n".join(self.chat.controls.guard(m.get("content") or "") for m in messages)
        return self.chat.controls.encode(text, add_special_tokens=True)

    def too_long(self, where: str, tokens: int) -> LongRow:
        """The error of a prompt with so many tokens."""
        return LongRow(
            f"task.max_prompt_tokens: the prompt of {where} has {tokens} tokens, the limit is "
            f"{self.max_prompt_tokens}; raise it, make such problems shorter, or leave them out "
            "with task.long_prompts: drop"
        )

    def _data(self, row: Row, messages: Messages, where: str) -> dict[str, Any]:
        """What the reward needs, as JSON values: the columns, `answer` and `prompt`.

        `prompt` is the list of chat messages if the row brought one, else the user's text.
        """
        prompt = messages[-1]["content"] if self.chat_of(row) is None else list(messages)
        data = {**row, "prompt": prompt}
        if self.answers != "none":
            data["answer"] = self.answer(row, where)
        for name in COLUMNS & row.keys():
            raise ValueError(
                f"task: {where} has the column {name!r}, under which a reward is given a part of "
                "the completion; rename it"
            )
        # Through JSON once, so that a reward sees the same values in a fresh and a resumed run.
        return json.loads(json.dumps(data, default=str))

    def answer(self, row: Row, where: str) -> Any:
        """The gold answer. Raises ValueError where one is needed and there is none."""
        return self.held(row, self.answer_field, "task.answer_field", where)

    def held(self, row: Row, column: str, field: str, where: str) -> Any:
        """The value of a column. field: what errors begin with. Raises ValueError for none."""
        if column not in row:
            raise _missing(field, column, row, where)
        value = row[column]
        needed = self.answers == "needed"
        if value is None or (needed and value in ("", [])):
            raise _null(field, column, value, where)
        if needed and isinstance(value, dict):
            raise _nested(field, column, cast(object, value), where)
        return value

    def _fill(self, row: Row, where: str) -> str:
        """The prompt template with the row's columns in it."""
        template, parts = self.prompt_template, list(Formatter().parse(self.prompt_template))
        names = [name for _, name, _, _ in parts if name is not None]
        for name in names:
            if name not in row:
                raise _missing("task.prompt_template", name, row, where)
            value = row[name]
            if value is None:
                raise _null("task.prompt_template", name, value, where)
            if isinstance(value, list | tuple | dict | bytes):
                raise _nested("task.prompt_template", name, cast(object, value), where)
        if all(not str(row[name]).strip() for name in names):
            raise _null("task.prompt_template", names[0], "", where)
        controls = self.chat.controls
        try:
            filled = template.format(**{name: row[name] for name in names})
            guarded = template.format(**{name: controls.guard(row[name]) for name in names})
        # what stands behind a field's colon may fit no value, or not this one
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f"task.prompt_template: {where} does not fit {shown(template)}: {error}"
            ) from error
        return controls.composed("".join(text for text, *_ in parts), filled, guarded)


def question_key(messages: Messages) -> str:
    """Equal for equal questions; the system prompt, the same everywhere, is part of it."""
    return "\0".join(_key(message) for message in messages)


def _key(message: Message) -> str:
    key = f"{message['role']}\0{(message.get('content') or '').strip()}"
    calls = message.get("tool_calls")
    return f"{key}\0{json.dumps(calls, sort_keys=True, default=str)}" if calls else key


def _names(template: str, column: str) -> bool:
    return any(name == column for _, name, _, _ in Formatter().parse(template))


def _missing(field: str, column: str, row: Row, where: str) -> ValueError:
    return ValueError(f"{field}: {where} has no column {column!r}; {nearest(column, row)}")


def _null(field: str, column: str, value: object, where: str) -> NullRow:
    what = "null" if value is None else "empty"
    return NullRow(
        f"{field}: {where}: the column {column!r} is {what}; fill it in, or leave such rows out "
        "with task.null_rows: drop"
    )


def _nested(field: str, column: str, value: object, where: str) -> ValueError:
    return ValueError(
        f"{field}: {where}: the column {column!r} holds a {type(value).__name__}, "
        f"{shown(value)}; name a column of text or numbers, or flatten it"
    )
