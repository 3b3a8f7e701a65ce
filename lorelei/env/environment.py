"""The environment of a configuration."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from lorelei.config.env import EnvConfig
from lorelei.data.chat import ChatTemplate, TemplateRefused
from lorelei.env.contract import Endpoint, Env
from lorelei.env.single_turn import SingleTurn
from lorelei.reward.contract import Reward
from lorelei.user_file import load_function

_ASK = {"role": "user", "content": "?"}


@contextmanager
def _named(field: str) -> Generator[None]:
    """Names what of the configuration asks the template for something that it refuses."""
    try:
        yield
    except TemplateRefused as refused:
        raise ValueError(f"{field}: {refused}; use another model or env.kind") from refused


def make_env(
    env: EnvConfig,
    *,
    reward: Reward,
    chat: ChatTemplate,
    context: int,
    endpoint: Endpoint | None,
    model: str,
) -> Env:
    """The environment of one adapter.

    context: most tokens of a sequence. endpoint: for agents. model: what they call the adapter.
    Raises ValueError for code that cannot be loaded, for a model without a chat template, and for
    one whose template refuses such conversations.
    """
    if env.kind != "single_turn":
        chat.text([_ASK])
    if env.kind == "multi_turn":
        with _named("env.kind: multi_turn"):
            chat.text([_ASK, {"role": "assistant", "content": "?"}, _ASK])
    match env.kind:
        case "single_turn":
            return SingleTurn(reward=reward, chat=chat)
        case "multi_turn":
            from lorelei.env.multi_turn import MultiTurn

            return MultiTurn(
                reward=reward,
                chat=chat,
                context=context,
                max_turns=env.max_turns,
                feedback=env.feedback,
                solved=env.solved,
                turn_discount=env.turn_discount,
            )
        case "tools":
            from lorelei.env.tool import load_tool
            from lorelei.env.tools import ToolUsing

            tools = [load_tool(name) for name in env.tools]
            with _named("env.kind: tools"):
                chat.check_tools([tool.description for tool in tools])
            return ToolUsing(
                reward=reward,
                chat=chat,
                context=context,
                max_turns=env.max_turns,
                tools={tool.name: tool for tool in tools},
                timeout=env.timeout,
            )
        case "python":
            from lorelei.env.python_file import PythonFile

            return PythonFile(
                step=load_function(env.path, "env.path"),
                reward=reward,
                chat=chat,
                context=context,
                max_turns=env.max_turns,
                timeout=env.timeout,
            )
        case "agent":
            from lorelei.env.agent import Agent, check_client

            assert endpoint is not None
            function = load_function(env.path, "env.path")
            check_client(function)
            return Agent(
                function=function,
                reward=reward,
                chat=chat,
                endpoint=endpoint,
                model=model,
                max_turns=env.max_turns,
                timeout=env.timeout,
            )
