"""The part of OpenAI's chat completions that is spoken here: requests in, responses out."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lorelei.config.errors import nearest, shown
from lorelei.data.chat import ChatTemplate
from lorelei.data.tool_call import ToolCall, parse_calls
from lorelei.types import Turn


class Refused(Exception):
    """A request that is answered with an error; `field` is the one that is wrong, if any."""

    def __init__(
        self, message: str, *, status: int = 400, field: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.field, self.code = status, field, code

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.field, "code": self.code}
        return {"error": error}


class ChatRequest(BaseModel):
    """A checked request. What would change nothing is ignored, what we cannot do is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ignored: ClassVar[frozenset[str]] = frozenset(
        {
            "metadata",
            "parallel_tool_calls",
            "prompt_cache_key",
            "safety_identifier",
            "seed",
            "service_tier",
            "store",
            "user",
        }
    )
    # values that ask for nothing; anything else would need another distribution or another answer
    neutral: ClassVar[Mapping[str, Sequence[Any]]] = {
        "n": (1,),
        "logprobs": (False,),
        "top_logprobs": (0,),
        "logit_bias": ({},),
        "presence_penalty": (0,),
        "frequency_penalty": (0,),
        "repetition_penalty": (1,),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
    }

    model: str
    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] = []
    tool_choice: Literal["auto", "none"] = "auto"
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, Any] = {}
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_known(cls, data: Any) -> Any:
        kept: dict[str, Any] = {}
        for name, value in dict(data).items():
            if value is None or name in cls.ignored:
                continue
            if name in cls.neutral:
                if value not in cls.neutral[name]:
                    only = " or ".join(map(repr, cls.neutral[name]))
                    raise Refused(f"{name}: {shown(value)} is refused; use {only}", field=name)
                continue
            if name not in cls.model_fields:
                known = {*cls.model_fields, *cls.neutral, *cls.ignored}
                raise Refused(f"{name}: is unknown here; {nearest(name, known)}", field=name)
            kept[name] = value
        kept["messages"] = [_plain(m, i) for i, m in enumerate(kept.get("messages") or ())]
        return kept

    @property
    def offered(self) -> list[dict[str, Any]]:
        """The tools that the model may call."""
        return self.tools if self.tool_choice == "auto" else []

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def most(self) -> int | None:
        """Most tokens of the answer."""
        return self.max_completion_tokens or self.max_tokens


def read_request(body: bytes) -> ChatRequest:
    """Raises Refused, naming the field."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise Refused("the body must be a JSON object")
    try:
        return ChatRequest.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise Refused(
            f"{field}: {shown(first['input'])}: {first['msg']}", field=field or None
        ) from error


def _plain(message: Any, number: int) -> dict[str, Any]:
    """A message as templates and comparisons want it: text content, no empty fields."""
    where = f"messages.{number}"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise Refused(f"{where}: {shown(message)} needs a role", field=where)
    role = "system" if message["role"] == "developer" else message["role"]
    plain: dict[str, Any] = {"role": role, "content": _text(message.get("content"), where)}
    if calls := message.get("tool_calls"):
        plain["tool_calls"] = [_plain_call(call, where) for call in calls]
    for name in ("name", "tool_call_id"):
        if message.get(name) is not None:
            plain[name] = message[name]
    return plain


def _text(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [content]
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise Refused(f"{where}.content: {shown(part)} is not text", field=f"{where}.content")
    return "".join(part["text"] for part in parts)


def _plain_call(call: Any, where: str) -> dict[str, Any]:
    try:
        function = {"name": str(call["function"]["name"])}
        function["arguments"] = str(call["function"].get("arguments") or "{}")
        return {"id": str(call.get("id", "")), "type": "function", "function": function}
    except (AttributeError, KeyError, TypeError) as error:
        field = f"{where}.tool_calls"
        raise Refused(f"{field}: {shown(call)} is not a call of a function", field=field) from error


def _up_to(text: str, stops: Sequence[str]) -> str:
    ends = [text.find(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a client is told of a turn."""

    number: int  # within the episode
    model: str
    turn: Turn
    content: str | None
    calls: Sequence[ToolCall]

    @classmethod
    def of(cls, turn: Turn, request: ChatRequest, number: int, chat: ChatTemplate) -> Answer:
        """Calls are read off the text where tools were offered; one unreadable leaves it text."""
        reply, calls = chat.reply(turn), list[ToolCall]()
        content = _up_to(reply.text, request.stop_strings)
        if request.offered:
            written = _up_to(reply.protocol, request.stop_strings)
            before, calls = parse_calls(written, chat.tool_format(), request.offered)
            calls = [] if any(call.error for call in calls) else calls
            content = before if calls else content
        return cls(number=number, model=request.model, turn=turn, content=content, calls=calls)

    def message(self) -> dict[str, Any]:
        """The assistant's message."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.calls:
            message["content"] = self.content or None
            message["tool_calls"] = [
                {
                    "id": f"call{self.number:03d}{number:02d}",  # nine characters, for Mistral
                    "type": "function",
                    "function": {
                        "name": call.name,
                        "arguments": json.dumps(call.arguments, ensure_ascii=False),
                    },
                }
                for number, call in enumerate(self.calls)
            ]
        return message

    @property
    def finish_reason(self) -> str:
        return "tool_calls" if self.calls else self.turn.completion.finish_reason

    def usage(self) -> dict[str, int]:
        """Tokens read and written."""
        read, written = len(self.turn.prompt), len(self.turn.completion.tokens)
        return {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
        }

    def whole(self) -> dict[str, Any]:
        """The response."""
        choice = {
            "index": 0,
            "message": self.message(),
            "finish_reason": self.finish_reason,
            "logprobs": None,
        }
        return {**self._head("chat.completion"), "choices": [choice], "usage": self.usage()}

    def chunks(self, with_usage: bool) -> list[dict[str, Any]]:
        """The response as a stream: the message in one piece, then how it ended."""
        message = self.message()
        for number, call in enumerate(message.get("tool_calls", ())):
            call["index"] = number
        head = self._head("chat.completion.chunk")
        found = [
            {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
            for delta, reason in ((message, None), ({}, self.finish_reason))
        ]
        if with_usage:
            found.append({**head, "choices": [], "usage": self.usage()})
        return found

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self.number}",
            "object": kind,
            "created": int(time.time()),
            "model": self.model,
        }
