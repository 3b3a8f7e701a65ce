"""A tool: a function with the description that the model reads."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from lorelei.data.tool_call import ToolCall
from lorelei.env.calculator import calculator
from lorelei.env.user_code import call_within
from lorelei.user_file import load_function

MAX_RESULT = 4000  # characters of a result that the model reads
BUILT_IN: Mapping[str, Callable[..., object]] = {"calculator": calculator}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """What a model may call."""

    function: Callable[..., object]
    description: Mapping[str, Any]  # OpenAI's JSON

    @property
    def name(self) -> str:
        return self.description["function"]["name"]

    async def use(self, call: ToolCall, timeout: float) -> tuple[str, bool]:
        """(what the model is told, whether it worked). Raises nothing that the tool raises."""
        try:
            inspect.signature(self.function).bind(**call.arguments)
            result = await call_within(timeout, self.function, **call.arguments)
        # The border to the tool: what it raises is something for the model to read.
        except Exception as error:
            return f"error: {type(error).__name__}: {error}"[:MAX_RESULT], False
        return str(result)[:MAX_RESULT], True


def load_tool(name: str) -> Tool:
    """A built-in tool, or the function behind 'file.py:function'.

    Its description is made of its type hints and its docstring, whose `Args:` say what each
    parameter is. Raises ValueError for one that has no such description.
    """
    from transformers.utils.chat_template_utils import (
        get_json_schema,  # pyright: ignore[reportUnknownVariableType] it has no types
    )

    describe = cast(Callable[[Callable[..., object]], Mapping[str, Any]], get_json_schema)
    function = BUILT_IN.get(name) or load_function(name, "env.tools")
    try:
        return Tool(function=function, description=describe(function))
    except Exception as error:  # transformers raises a different exception for each defect
        raise ValueError(
            f"env.tools: {name!r} cannot be described to the model: {error}"
        ) from error


def unknown(call: ToolCall, tools: Mapping[str, Tool]) -> str:
    """What to say of a call that names no tool."""
    return f"error: {call.error or f'there is no tool {call.name!r}'}; tools: {', '.join(tools)}"


async def use_all(
    calls: list[ToolCall], tools: Mapping[str, Tool], timeout: float
) -> list[tuple[str, bool]]:
    """What the model is told of each call, and whether it worked; all at once."""

    async def use(call: ToolCall) -> tuple[str, bool]:
        tool = None if call.error else tools.get(call.name)
        return (unknown(call, tools), False) if tool is None else await tool.use(call, timeout)

    return await asyncio.gather(*map(use, calls))
