"""Messages and tools from outside: checked, and as a chat template reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard, cast

from lorelei.config.errors import shown
from lorelei.data.tool_call import Format, Tools, describe, format_call, format_response

Message = Mapping[str, Any]  # role, content; tool_calls and tool_call_id as OpenAI has them


def is_message(value: object) -> TypeGuard[Message]:
    """Whether a value from outside is a message: a role, and a text or calls of tools."""
    if not isinstance(value, Mapping):
        return False
    message = cast(Mapping[str, object], value)
    content, calls = message.get("content"), message.get("tool_calls")
    spoken = isinstance(content, str) or (content is None and bool(calls))
    return isinstance(message.get("role"), str) and spoken and _are_calls(calls)


def _are_calls(calls: object) -> bool:
    listed = cast(list[object], calls) if isinstance(calls, list | tuple) else None
    if listed is None:
        return calls is None
    return all(isinstance(_function(call).get("name"), str) for call in listed)


def without_nulls(value: Any) -> Any:
    """Without the keys that tables fill up with null, at any depth."""
    if isinstance(value, Mapping):
        held = cast(Mapping[str, Any], value)
        return {k: without_nulls(v) for k, v in held.items() if v is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(one) for one in cast(Sequence[Any], value)]
    return value


def read_tools(value: object) -> list[dict[str, Any]] | None:
    """The tools of a row: OpenAI's JSON, as values or as text; None for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if not isinstance(value, list) or not value:
        return None
    tools: list[dict[str, Any]] = []
    for tool in cast(list[object], value):
        plain: dict[str, Any] = without_nulls(tool) if isinstance(tool, dict) else {}
        if not isinstance(_function(plain).get("name"), str):
            return None
        tools.append(plain if "function" in plain else {"type": "function", "function": plain})
    return tools


def for_template(
    messages: Sequence[Message], tools: Tools, source: str, format: Format
) -> list[dict[str, Any]]:
    """The conversation as a chat template with this source reads it.

    Calls and tools that it does not know are written as text.
    """
    chat = [_plain(message, "tool_calls" in source, format) for message in messages]
    return chat if "tools" in source else _without_tools(chat, tools)


def arguments_of(call: Mapping[str, Any]) -> Any:
    """The arguments of a call as an object. Raises ValueError for what is not JSON."""
    held = _function(call).get("arguments") or "{}"
    if not isinstance(held, str):
        return held
    try:
        return json.loads(held)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"tool_calls: the arguments {shown(held)} are not JSON") from error


def _function(call: object) -> Mapping[str, Any]:
    """The part with name and arguments, of what may be a call or a tool."""
    whole = _mapping(call)
    return _mapping(whole.get("function", whole))


def _mapping(value: object) -> Mapping[str, Any]:
    return cast(Mapping[str, Any], value) if isinstance(value, Mapping) else {}


def _plain(message: Message, knows_calls: bool, format: Format) -> dict[str, Any]:
    """A message with the arguments of its calls as objects: templates write them as JSON."""
    plain: dict[str, Any] = {"content": "", **{k: v for k, v in message.items() if v is not None}}
    calls = plain.pop("tool_calls", None)
    if not calls:
        return plain
    if not knows_calls:
        written = [format_call(_function(c)["name"], arguments_of(c), format) for c in calls]
        return {**plain, "content": "\n".join(filter(None, [plain["content"], *written]))}
    return {**plain, "tool_calls": [_with_object(call) for call in calls]}


def _with_object(call: Mapping[str, Any]) -> dict[str, Any]:
    if "function" not in call:
        return {**call, "arguments": arguments_of(call)}
    return {**call, "function": {**call["function"], "arguments": arguments_of(call)}}


def _without_tools(messages: Sequence[dict[str, Any]], tools: Tools) -> list[dict[str, Any]]:
    """The conversation for a template that knows text alone."""
    chat: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "tool":
            text = format_response(message["content"])
            if chat and chat[-1]["content"].endswith("</tool_response>"):
                chat[-1]["content"] += f"\n{text}"
                continue
            message = {"role": "user", "content": text}
        chat.append(dict(message))
    if tools and chat and chat[0]["role"] == "system":
        chat[0]["content"] += f"\n\n{describe(tools)}"
    elif tools:
        chat.insert(0, {"role": "system", "content": describe(tools)})
    return chat
