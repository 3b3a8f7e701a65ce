"""Tool calls as text, in the formats that chat templates teach.

A tool is described by OpenAI's JSON: {"type": "function", "function": {name, description,
parameters}}. The formats of a call:

- hermes: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as Qwen2.5 and Qwen3
- json: `{"name": ..., "parameters": {...}}` and nothing else, as Llama 3
- tags: `<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>`, as
  Qwen3-Coder
- mistral: `[TOOL_CALLS]` and a JSON list, or `[TOOL_CALLS]NAME[ARGS]{...}`
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

Tools = Sequence[Mapping[str, Any]]
Format = Literal["hermes", "json", "tags", "mistral"]
FORMATS: tuple[Format, ...] = ("hermes", "mistral", "tags", "json")  # most telling first

_HERMES = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_TAGS = re.compile(
    r"(?:<tool_call>\s*)?<function=(.*?)(?:</function>|\Z)(?:\s*</tool_call>)?", re.S
)
_PARAMETER = re.compile(r"<parameter=([^>\n]*)>\n?(.*?)\n?</parameter>", re.DOTALL)
_PYTHON_TAG, _MISTRAL, _ARGS = "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]"
_BETWEEN = re.compile(r"[\s;]*")  # what may stand between two calls in JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One call; `error` says why it cannot be made, and then the name may be empty."""

    name: str
    arguments: Mapping[str, Any]
    error: str | None = None


def parse_calls(
    text: str, format: Format = "hermes", tools: Tools = ()
) -> tuple[str, list[ToolCall]]:
    """The text before the first call, and the calls in order, unreadable ones too.

    tools: by whose schemas arguments that come as text are read (format tags).
    """
    at, calls = _PARSERS[format](text, tools)
    return text[:at].strip() if calls else text, calls


def format_call(name: str, arguments: Mapping[str, Any], format: Format = "hermes") -> str:
    """A call as the model would write it."""
    match format:
        case "hermes":
            body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
            return f"<tool_call>\n{body}\n</tool_call>"
        case "json":
            return json.dumps({"name": name, "parameters": arguments}, ensure_ascii=False)
        case "mistral":
            call = {"name": name, "arguments": arguments}
            return f"{_MISTRAL}{json.dumps([call], ensure_ascii=False)}"
        case "tags":
            given = "".join(
                f"<parameter={key}>\n{_written(value)}\n</parameter>\n"
                for key, value in arguments.items()
            )
            return f"<tool_call>\n<function={name}>\n{given}</function>\n</tool_call>"


def format_response(content: str) -> str:
    """What a tool returned, for templates without a role `tool`."""
    return f"<tool_response>\n{content}\n</tool_response>"


def describe(tools: Tools) -> str:
    """The system prompt's part about tools, for templates that have none."""
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        "You may call tools. They are described by JSON schemas:\n"
        f"<tools>\n{lines}\n</tools>\n"
        "To call one, write its name and its arguments as JSON between these tags:\n"
        '<tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call>\n'
        "The result is given to you between <tool_response> tags."
    )


def taught_by(
    source: str, written: str | None, name: str, arguments: Mapping[str, Any]
) -> Format | None:
    """The format that a chat template teaches, if it is one of ours.

    source: of the template. written: how it writes a call of `name` with `arguments`; None: it
    does not.
    """
    if written is not None:
        for format in FORMATS:
            _, calls = parse_calls(written, format)
            if [(c.name, dict(c.arguments), c.error) for c in calls] == [(name, arguments, None)]:
                return format
        return None
    if "<function=" in source:
        return "tags"
    if _MISTRAL in source:
        return "mistral"
    if "<tool_call>" in source:
        return "hermes"
    named = re.search(r"\\?[\"']name\\?[\"'].{0,200}?\\?[\"']parameters\\?[\"']", source, re.S)
    return "json" if named else None


def _hermes(text: str, tools: Tools) -> tuple[int, list[ToolCall]]:
    return text.find("<tool_call>"), [_call(m.group(1)) for m in _HERMES.finditer(text)]


def _json(text: str, tools: Tools) -> tuple[int, list[ToolCall]]:
    """Nothing but calls, one behind the other; a JSON answer that is no call is an answer."""
    body = text.strip()
    tagged = body.startswith(_PYTHON_TAG)
    body = body.removeprefix(_PYTHON_TAG).removesuffix("<|eom_id|>").strip()
    if not tagged and not body.startswith("{"):
        return 0, []
    calls: list[ToolCall] = []
    at = 0
    while at < len(body):
        try:
            value, end = json.JSONDecoder().raw_decode(body, at)
        except (ValueError, RecursionError) as error:
            if not tagged and not calls and re.match(r"\{\s*\"name\"", body) is None:
                return 0, []
            return 0, [*calls, _unreadable(f"the call is not JSON: {error}")]
        if not calls and not tagged and not _is_call(value):
            return 0, []
        calls.append(_checked(value))
        between = _BETWEEN.match(body, end)
        at = between.end() if between else end
    return 0, calls


def _tags(text: str, tools: Tools) -> tuple[int, list[ToolCall]]:
    found = list(_TAGS.finditer(text))
    if not found:  # another format between the tags, or nothing
        return _hermes(text, tools)
    return found[0].start(), [_tagged(match, tools) for match in found]


def _tagged(match: re.Match[str], tools: Tools) -> ToolCall:
    name, closed, body = match.group(1).partition(">")
    name = name.strip().strip("\"'")
    if not closed or not name or "</function>" not in match.group(0):
        return _unreadable("the call must be <function=NAME>...</function>")
    if "<parameter=" not in body and body.strip():  # Llama's <function=NAME>{...}</function>
        return _checked({"name": name, "arguments": _loaded(body)})
    types = _types(name, tools)
    pairs = _PARAMETER.findall(body)
    if len(pairs) != body.count("<parameter="):
        return ToolCall(name=name, arguments={}, error="a <parameter=...> is not closed")
    return ToolCall(
        name=name,
        arguments={key.strip(): _typed(value, types.get(key.strip())) for key, value in pairs},
    )


def _mistral(text: str, tools: Tools) -> tuple[int, list[ToolCall]]:
    at = text.find(_MISTRAL)
    if at < 0:
        return 0, []
    calls: list[ToolCall] = []
    for part in filter(None, map(str.strip, text[at:].split(_MISTRAL))):
        if _ARGS in part:
            name, _, body = part.partition(_ARGS)
            name = name.partition("[CALL_ID]")[0].strip()
            calls.append(_checked({"name": name, "arguments": _loaded(body)}))
            continue
        listed = _loaded(part)
        several = cast(list[object], listed) if isinstance(listed, list) else [listed]
        calls += [_checked(one) for one in several]
    return at, calls


_PARSERS: Mapping[Format, Callable[[str, Tools], tuple[int, list[ToolCall]]]] = {
    "hermes": _hermes,
    "json": _json,
    "tags": _tags,
    "mistral": _mistral,
}


def _call(body: str) -> ToolCall:
    return _checked(_loaded(body))


def _loaded(body: str) -> object:
    """The JSON of a call, or why it is none."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        return error


def _is_call(value: object) -> bool:
    fields = cast(dict[str, Any], value) if isinstance(value, dict) else {}
    return isinstance(fields.get("name"), str) and not {"parameters", "arguments"}.isdisjoint(
        fields
    )


def _checked(call: object) -> ToolCall:
    if isinstance(call, Exception):
        return _unreadable(f"the call is not JSON: {call}")
    fields = cast(dict[str, Any], call) if isinstance(call, dict) else {}
    name = fields.get("name")
    arguments = fields.get("arguments", fields.get("parameters", {}))
    if not isinstance(name, str):
        return _unreadable('the call must be {"name", "arguments"}')
    if isinstance(arguments, Exception):
        return ToolCall(name=name, arguments={}, error=f"the arguments are not JSON: {arguments}")
    if not isinstance(arguments, dict):
        return ToolCall(name=name, arguments={}, error="arguments must be an object")
    return ToolCall(name=name, arguments=cast(dict[str, Any], arguments))


def _unreadable(reason: str) -> ToolCall:
    return ToolCall(name="", arguments={}, error=reason)


def _types(name: str, tools: Tools) -> Mapping[str, Any]:
    """The types of a tool's parameters by its schema."""
    for tool in tools:
        function = _mapping(tool.get("function", tool))
        if function.get("name") == name:
            properties = _mapping(_mapping(function.get("parameters")).get("properties"))
            return {key: _mapping(schema).get("type") for key, schema in properties.items()}
    return {}


def _mapping(value: object) -> Mapping[str, Any]:
    return cast(Mapping[str, Any], value) if isinstance(value, Mapping) else {}


def _typed(value: str, kind: object) -> Any:
    """Text as its schema wants it; text that is nothing of the kind stays text."""
    if kind in (None, "string"):
        return value
    try:
        return json.loads(value.strip())
    except (ValueError, RecursionError):
        return {"True": True, "False": False, "None": None}.get(value.strip(), value)


def _written(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
