"""Tool calls as text, in the Hermes format that Qwen's models were trained on.

A tool is described by OpenAI's JSON: {"type": "function", "function": {name, description,
parameters}}. The model calls it with `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`
and is given `<tool_response>...</tool_response>`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One call; `error` says why it cannot be made, and then the name may be empty."""

    name: str
    arguments: Mapping[str, Any]
    error: str | None = None


def parse_calls(text: str) -> tuple[str, list[ToolCall]]:
    """The text before the first call, and the calls in order, unreadable ones too."""
    calls = [_parse(match.group(1)) for match in _CALL.finditer(text)]
    return text.partition("<tool_call>")[0].strip() if calls else text, calls


def format_call(name: str, arguments: Mapping[str, Any]) -> str:
    """A call as the model would write it."""
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"


def format_response(content: str) -> str:
    """What a tool returned, for templates without a role `tool`."""
    return f"<tool_response>\n{content}\n</tool_response>"


def describe(tools: Sequence[Mapping[str, Any]]) -> str:
    """The system prompt's part about tools, for templates that have none."""
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        "You may call tools. They are described by JSON schemas:\n"
        f"<tools>\n{lines}\n</tools>\n"
        "To call one, write its name and its arguments as JSON between these tags:\n"
        '<tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call>\n'
        "The result is given to you between <tool_response> tags."
    )


def _parse(body: str) -> ToolCall:
    try:
        call = json.loads(body)
    except (ValueError, RecursionError) as error:
        return ToolCall(name="", arguments={}, error=f"the call is not JSON: {error}")
    fields = cast(dict[str, Any], call) if isinstance(call, dict) else {}
    name, arguments = fields.get("name"), fields.get("arguments", {})
    if not isinstance(name, str):
        return ToolCall(name="", arguments={}, error='the call must be {"name", "arguments"}')
    if not isinstance(arguments, dict):
        return ToolCall(name=name, arguments={}, error="arguments must be an object")
    return ToolCall(name=name, arguments=cast(dict[str, Any], arguments))
