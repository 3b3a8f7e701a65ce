"""The chat template: messages become tokens; sampled tokens are kept, never tokenised again.

Shapes: P prompt tokens.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lorelei.data.control_tokens import ControlTokens
from lorelei.data.messages import Message, for_template
from lorelei.data.reply import TAGS, THINKING, Reply
from lorelei.data.tool_call import Format, ToolCall, Tools, format_call, parse_calls, taught_by
from lorelei.types import Ints, Turn

if TYPE_CHECKING:
    from lorelei.model.tokenizer import Tokenizer

_MARK = f"mark{secrets.token_hex(8)}"  # an answer while the template is asked what follows it
_ASK: Message = {"role": "user", "content": "?"}
# what an assistant's message may hold of control tokens
_ITS_OWN = (*TAGS, "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>")
_PREFIX_TOKENS = 48  # at the end of a prompt, where a template opens thinking
_OPENED = re.compile(
    "(?:" + "|".join(f"{re.escape(o)}\\s*(?:{re.escape(c)}\\s*)?" for o, c in THINKING) + ")\\Z"
)


class TemplateRefused(ValueError):
    """A chat template, which is code of the model, does not take these messages."""


@dataclass(slots=True, kw_only=True, eq=False)
class ChatTemplate:
    """How a model writes conversations."""

    tokenizer: Tokenizer
    stop_token_ids: tuple[int, ...]
    variables: Mapping[str, Any] = field(default_factory=dict[str, Any])  # of the template
    control_tokens: Literal["text", "tokens"] = "text"  # what those in messages are read as
    controls: ControlTokens = field(init=False)
    _formats: dict[bool, Format | None] = field(init=False, default_factory=dict[bool, Any])

    def __post_init__(self) -> None:
        """Raises ValueError for a variable that the template does not have."""
        self.controls = ControlTokens(self.tokenizer, as_text=self.control_tokens == "text")
        sources = self.source() + self.source(tools=True)
        for name in self.variables:
            if re.search(rf"\b{re.escape(name)}\b", sources) is None:
                raise ValueError(
                    f"task.chat_template_kwargs: {name!r} is no variable of the model's chat "
                    "template; correct or remove it"
                )

    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> Ints:
        """[P] the conversation and the beginning of an answer.

        Raises ValueError when the template refuses the messages or the tokenizer has none.
        """
        return self._tokens(self._written(messages, tools))

    def follow(self, messages: Sequence[Message], at: int, answer: Turn, tools: Tools = ()) -> Ints:
        """[P] like `prompt`, where messages[at] is `answer` and later ones are new.

        The tokens of the answer and of all that it was sampled from are kept, and only what the
        template writes behind it is tokenised. Where the template rewrites what came before (some
        drop the thinking of earlier answers), the conversation as it now reads is tokenised anew:
        the answer then is a training sequence apart. Raises like `prompt`.
        """
        before, after, spoken = messages[:at], messages[at + 1 :], self.spoken(answer)
        try:
            marked = self._written([*before, {**spoken, "content": _MARK}, *after], tools)
            whole = self._written([*before, spoken, *after], tools)
        except TemplateRefused as refused:
            return self._follow_calls(before, after, answer, tools, refused)
        _, mark, tail = marked.partition(_MARK)
        written = self._written(before, tools) + self.controls.guard(answer.text, _ITS_OWN)
        if not mark or not _same(whole, written + tail):
            return self._tokens(whole)
        return self._behind(answer, tail)

    def text(self, messages: Sequence[Message], tools: Tools = ()) -> str:
        """What the template writes, up to the beginning of an answer. Raises like `prompt`."""
        return self.controls.plain(self._written(messages, tools))

    def learnt(self, chat: Sequence[Message], answer: Message, tools: Tools) -> tuple[Ints, Ints]:
        """[P] the prompt, and the tokens that the template writes for the answer behind it.

        Raises ValueError like `prompt`, and where the answer changes what stands before it.
        """
        before = self._written(chat, tools)
        whole = self._written([*chat, answer], tools, opening=False)
        return self._tokens(before), self._tokens(self._behind_text(before, whole))

    def turns(self, messages: Sequence[Message], tools: Tools) -> list[tuple[Ints, Ints]]:
        """Of each assistant's message: the tokens since the one before, and its own.

        Raises ValueError like `learnt`.
        """
        found: list[tuple[Ints, Ints]] = []
        done = ""
        for at, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._written(messages[:at], tools)
            whole = self._written(messages[: at + 1], tools, opening=False)
            between, own = self._behind_text(done, before), self._behind_text(before, whole)
            found.append((self._tokens(between), self._tokens(own)))
            done = whole
        return found

    def _behind_text(self, before: str, whole: str) -> str:
        if not whole.startswith(before):
            raise ValueError(
                "the model's chat template writes the chat with the answer in another way than "
                "without it, so that its beginning cannot be told"
            )
        return whole[len(before) :]

    def reply(self, turn: Turn) -> Reply:
        """What was answered, as its readers want it."""
        tokens = turn.completion.tokens.tolist()
        if tokens and tokens[-1] in self.stop_token_ids:
            tokens.pop()
        raw = str(self.tokenizer.decode(tokens, skip_special_tokens=False))
        end = self.tokenizer.decode(turn.prompt[-_PREFIX_TOKENS:].tolist())
        opened = _OPENED.search(str(end))
        return Reply.of(turn.text, raw, opened[0] if opened else "")

    def spoken(self, turn: Turn) -> dict[str, str]:
        """An answer as a message: with what the template had begun it with."""
        return {"role": "assistant", "content": self.reply(turn).prefix + turn.text}

    def calls(self, turn: Turn, tools: Tools) -> tuple[str, list[ToolCall]]:
        """The text before the first call, and the calls; none inside of thinking.

        Raises ValueError for a template that teaches a format which is not known here.
        """
        return parse_calls(self.reply(turn).protocol, self.tool_format(), tools)

    def tool_format(self) -> Format:
        """How calls are written. Raises like `calls`."""
        source = self.source(tools=True)
        native = "tools" in source
        if native not in self._formats:
            self._formats[native] = self._taught(source) if native else "hermes"
        if (found := self._formats[native]) is not None:
            return found
        raise ValueError(
            f"model: the chat template of {self.tokenizer.name_or_path or 'the tokenizer'} teaches "
            "a format of tool calls that is not known here (Hermes, Llama 3 JSON, Qwen3-Coder, "
            "Mistral); use env.kind agent or python, or a model with one of these"
        )

    def check_tools(self, tools: Tools) -> None:
        """Raises ValueError where the template refuses tools, calls or their results."""
        format = self.tool_format()
        name = tools[0]["function"]["name"]
        call = {"role": "assistant", "content": format_call(name, {}, format)}
        result = {"role": "tool", "name": name, "content": "?", "tool_call_id": call_id(0)}
        try:
            self._written([_ASK, call, result], tools)
        except TemplateRefused:
            structured = _structured("", [ToolCall(name=name, arguments={})], [result])
            self._written([_ASK, structured, result], tools)

    def source(self, tools: bool = False) -> str:
        """The template's code; "" without one."""
        held = self.tokenizer.chat_template or ""
        if isinstance(held, str):
            return held
        return held.get("tool_use" if tools and "tool_use" in held else "default", "")

    def _taught(self, source: str) -> Format | None:
        name, arguments = "lookup", {"word": "lorelei"}
        if "tool_calls" not in source:
            return taught_by(source, None, name, arguments)
        schema = {"type": "object", "properties": {"word": {"type": "string"}}}
        function = {"name": name, "description": "Look up.", "parameters": schema}
        call = _structured("", [ToolCall(name=name, arguments=arguments)], [])
        tools = [{"type": "function", "function": function}]
        try:
            before = self._written([_ASK], tools, opening=False, format="hermes")
            whole = self._written([_ASK, call], tools, opening=False, format="hermes")
        except TemplateRefused:
            return taught_by(source, None, name, arguments)
        return taught_by(source, self._without_end(whole.removeprefix(before)), name, arguments)

    def _without_end(self, written: str) -> str:
        """An answer without its heading and without the control tokens behind it."""
        heading, mark, end = self._written(
            [_ASK, {"role": "assistant", "content": _MARK}], opening=False
        ).partition(_MARK)
        heading = heading[len(self._written([_ASK], opening=False)) :] if mark else ""
        return written.removeprefix(heading).removesuffix(end).strip()

    def _follow_calls(
        self,
        before: Sequence[Message],
        after: Sequence[Message],
        answer: Turn,
        tools: Tools,
        refused: TemplateRefused,
    ) -> Ints:
        """`follow` for templates that take an answer with calls only as a message with calls."""
        content, calls = self.calls(answer, tools)
        if not calls or any(call.error for call in calls):
            raise refused
        said = _structured(content, calls, after)
        head = self._written([*before, said], tools, opening=False)
        whole = self._written([*before, said, *after], tools)
        marked = self._written(
            [*before, {"role": "assistant", "content": _MARK}], tools, opening=False
        )
        closing = marked.partition(_MARK)[2]
        begun = self._written(before, tools, opening=False)
        if not (whole.startswith(head) and head.startswith(begun) and head.endswith(closing)):
            return self._tokens(whole)
        return self._behind(answer, closing + whole[len(head) :])

    def _written(
        self,
        messages: Sequence[Message],
        tools: Tools = (),
        *,
        opening: bool = True,
        format: Format | None = None,
    ) -> str:
        """What the template writes, guarded. opening: with the beginning of an answer."""
        source = self.source(bool(tools))
        if not source:
            raise ValueError(
                "model: its tokenizer has no chat template, which conversations need; "
                "use an instruct model"
            )
        if format is None:
            knows = "tool_calls" in source or not any(m.get("tool_calls") for m in messages)
            format = "hermes" if knows else self.tool_format()
        chat = for_template([self._guarded(m) for m in messages], tools, source, format)
        try:
            text = self.tokenizer.apply_chat_template(
                chat,
                tools=self.controls.guard(list(tools)) if "tools" in source and tools else None,
                tokenize=False,
                add_generation_prompt=opening,
                **self.variables,
            )
        # The border to the template: it is code, and may raise anything.
        except Exception as error:
            reason = " ".join(self.controls.plain(str(error)).split()) or type(error).__name__
            raise TemplateRefused(
                f"the model's chat template refuses the messages: {reason}"
            ) from error
        return str(text)

    def _guarded(self, message: Message) -> Message:
        return self.controls.guard(message, _ITS_OWN if message.get("role") == "assistant" else ())

    def _tokens(self, text: str) -> Ints:
        return np.asarray(self.controls.encode(text), dtype=np.int32)

    def _behind(self, answer: Turn, tail: str) -> Ints:
        sampled = answer.completion.tokens
        return np.concatenate([answer.prompt, sampled, self._tail(sampled, tail)])

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


def call_id(number: int) -> str:
    """Of an episode's call; nine characters, as Mistral's templates want it."""
    return f"call{number:05d}"


def _structured(
    content: str, calls: Sequence[ToolCall], after: Sequence[Message]
) -> dict[str, Any]:
    """An assistant's message with calls, under the ids that their results give."""
    ids = [m["tool_call_id"] for m in after if m.get("role") == "tool" and "tool_call_id" in m]
    ids += [call_id(number) for number in range(len(ids), len(calls))]
    listed = [
        {"id": ids[n], "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
        for n, c in enumerate(calls)
    ]
    return {"role": "assistant", "content": content, "tool_calls": listed}


def _same(text: str, other: str) -> bool:
    """Equal but for white space, which many templates trim."""
    return "".join(text.split()) == "".join(other.split())
