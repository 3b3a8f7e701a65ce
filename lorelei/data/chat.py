"""The chat template: messages become tokens; sampled tokens are kept, never tokenised again.

Shapes: P prompt tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import numpy as np

from lorelei.data.tool_call import describe, format_call, format_response
from lorelei.types import Ints, Turn

if TYPE_CHECKING:
    from lorelei.model.tokenizer import Tokenizer

Message = Mapping[str, Any]  # role, content; tool_calls and tool_call_id as OpenAI has them
Tools = Sequence[Mapping[str, Any]]

_MARK = "lorelei4f1c7e"  # stands for an answer while the template is asked what follows it


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplate:
    """How a model writes conversations."""

    tokenizer: Tokenizer
    stop_token_ids: tuple[int, ...]

    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> Ints:
        """[P] the conversation and the beginning of an answer.

        Raises ValueError when the template refuses the messages or the tokenizer has none.
        """
        return self._tokens(self.text(messages, tools))

    def follow(self, messages: Sequence[Message], at: int, answer: Turn, tools: Tools = ()) -> Ints:
        """[P] like `prompt`, where messages[at] is `answer` and later ones are new.

        The tokens of the answer and of all that it was sampled from are kept, and only what the
        template writes behind it is tokenised. Where the template rewrites what came before (some
        drop the thinking of earlier answers), the conversation as it now reads is tokenised anew:
        the answer then is a training sequence apart. Raises like `prompt`.
        """
        spoken = {"role": "assistant", "content": answer.text}
        before, after = messages[:at], messages[at + 1 :]
        marked = self.text([*before, {**spoken, "content": _MARK}, *after], tools)
        whole = self.text([*before, spoken, *after], tools)
        _, mark, tail = marked.partition(_MARK)
        unchanged = self.text(before, tools) + answer.text + tail
        if not mark or not _same(whole, unchanged):
            return self._tokens(whole)
        sampled = answer.completion.tokens
        return np.concatenate([answer.prompt, sampled, self._tail(sampled, tail)])

    def text(self, messages: Sequence[Message], tools: Tools = ()) -> str:
        """What the template writes, up to the beginning of an answer. Raises like `prompt`."""
        import jinja2

        if not self.tokenizer.chat_template:
            raise ValueError(
                "model: its tokenizer has no chat template, which conversations need; "
                "use an instruct model"
            )
        native = "tools" in str(self.tokenizer.chat_template)
        chat = [_for_template(m) for m in messages] if native else _without_tools(messages, tools)
        try:
            text = self.tokenizer.apply_chat_template(
                chat,
                tools=[dict(t) for t in tools] if native and tools else None,
                tokenize=False,
                add_generation_prompt=True,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the model's chat template refuses the messages: {error}") from error
        return str(text)

    def _tokens(self, text: str) -> Ints:
        return np.asarray(
            self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32
        )

    def _tail(self, sampled: Ints, tail: str) -> Ints:
        """The tokens behind an answer; its own stop token closes it already."""
        if len(sampled) and int(sampled[-1]) in self.stop_token_ids:
            stop = str(self.tokenizer.decode([int(sampled[-1])]))
            if tail.lstrip().startswith(stop):
                tail = tail.lstrip()[len(stop) :]
        # behind a special token, as in the conversation: some tokenizers write the beginning of
        # a text differently
        anchor = str(self.tokenizer.eos_token or "")
        before, both = self._tokens(anchor), self._tokens(anchor + tail)
        kept = len(before) <= len(both) and np.array_equal(both[: len(before)], before)
        return both[len(before) :] if kept else self._tokens(tail)


def is_message(value: object) -> TypeGuard[Message]:
    """Whether a value from outside is a message with the strings 'role' and 'content'."""
    if not isinstance(value, Mapping):
        return False
    message = cast(Mapping[str, object], value)
    return all(isinstance(message.get(key), str) for key in ("role", "content"))


def _same(text: str, other: str) -> bool:
    """Equal but for white space, which many templates trim."""
    return "".join(text.split()) == "".join(other.split())


def _for_template(message: Message) -> dict[str, Any]:
    """A message with the arguments of its calls as objects: templates write them as JSON."""
    plain: dict[str, Any] = {"content": "", **{k: v for k, v in message.items() if v is not None}}
    if calls := plain.get("tool_calls"):
        plain["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _arguments(call)}}
            for call in calls
        ]
    return plain


def _arguments(call: Mapping[str, Any]) -> Any:
    held = call["function"].get("arguments") or "{}"
    if not isinstance(held, str):
        return held
    try:
        return json.loads(held)
    except ValueError as error:
        raise ValueError(f"tool_calls: the arguments {held[:80]!r} are not JSON") from error


def _without_tools(messages: Sequence[Message], tools: Tools) -> list[dict[str, str]]:
    """The conversation for a template that knows text alone."""
    chat: list[dict[str, str]] = []
    for message in messages:
        role, text = message["role"], message.get("content") or ""
        if role == "tool":
            role, text = "user", format_response(text)
            if chat and chat[-1]["content"].endswith("</tool_response>"):
                chat[-1]["content"] += f"\n{text}"
                continue
        calls = message.get("tool_calls") or ()
        written = [format_call(call["function"]["name"], _arguments(call)) for call in calls]
        chat.append({"role": role, "content": "\n".join([*([text] if text else []), *written])})
    if tools and chat and chat[0]["role"] == "system":
        chat[0]["content"] += f"\n\n{describe(tools)}"
    elif tools:
        chat.insert(0, {"role": "system", "content": describe(tools)})
    return chat
