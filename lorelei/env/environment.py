"""The environment of a configuration."""

from __future__ import annotations

from lorelei.config.env import EnvConfig
from lorelei.data.chat import ChatTemplate
from lorelei.env.contract import Endpoint, Env
from lorelei.env.single_turn import SingleTurn
from lorelei.reward.contract import Reward
from lorelei.user_file import load_function


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
    Raises ValueError for code that cannot be loaded and for a model without a chat template.
    """
    if env.kind != "single_turn":
        chat.text([{"role": "user", "content": "?"}])
    match env.kind:
        case "single_turn":
            return SingleTurn(reward=reward)
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
                endpoint=endpoint,
                model=model,
                max_turns=env.max_turns,
                timeout=env.timeout,
            )
