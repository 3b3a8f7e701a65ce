"""The agent environment: a user's function talks to the model through an OpenAI client."""

from __future__ import annotations

import copy
import importlib.util
import inspect
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from lorelei.data.chat import ChatTemplate
from lorelei.data.reply import Reply
from lorelei.env.contract import Endpoint, Episode, Line, Sampler
from lorelei.env.user_code import call_within, given, scored
from lorelei.reward.contract import Reward
from lorelei.types import Prompt
from lorelei.user_file import accepted


@dataclass(frozen=True, slots=True, kw_only=True)
class Agent:
    """An Env around `run(client, model, data)`, async or not.

    It is given what it names of `client` (openai.AsyncOpenAI, or openai.OpenAI for a function
    that is not async), `base_url`, `api_key`, `model`, `messages` (the prompt's) and `data` (this
    episode's own copy of Prompt.data). It returns a number or (number, {metric: number}): the
    reward; a text, which the run's reward scores; or None: it scores the last answer.
    """

    function: Callable[..., Any]
    reward: Reward
    chat: ChatTemplate
    endpoint: Endpoint
    model: str
    max_turns: int
    timeout: float  # seconds for an episode

    async def run(self, prompt: Prompt, sample: Sampler) -> Episode:
        """See Env. Raises what the function raises, or what kept the engine from answering."""
        async with self.endpoint.open(sample, self.model, self.max_turns, self.chat) as line:
            try:
                result = await self._play(line, prompt)
            except Exception:
                if line.failure is not None:  # the agent only saw a status of 5xx
                    raise line.failure from None
                raise
            turns = line.turns
        if not turns:
            return Episode(turns=(), reward=None, error="the agent asked the model for nothing")
        if result is None or isinstance(result, str):
            reply = self.chat.reply(turns[-1]) if result is None else Reply.of(result)
            return await scored(turns, prompt, self.reward, reply)
        return given(turns, result)

    async def _play(self, line: Line, prompt: Prompt) -> Any:
        async with AsyncExitStack() as stack:
            values: dict[str, Any] = {
                "base_url": line.base_url,
                "api_key": line.api_key,
                "model": self.model,
                "messages": [dict(m) for m in prompt.messages],
                "data": copy.deepcopy(dict(prompt.data)),
            }
            if "client" in inspect.signature(self.function).parameters:
                values["client"] = await _client(self.function, line, stack)
            return await call_within(self.timeout, self.function, **accepted(self.function, values))


def check_client(function: Callable[..., Any]) -> None:
    """Raises ValueError for a function that asks for `client` where openai is not installed."""
    asks = "client" in inspect.signature(function).parameters
    if asks and importlib.util.find_spec("openai") is None:
        raise ValueError(
            "env.path: the function asks for `client`, and openai is not installed; "
            "`pip install openai`, or ask for base_url and api_key"
        )


async def _client(function: Callable[..., Any], line: Line, stack: AsyncExitStack) -> Any:
    """A client that neither asks twice nor goes through a proxy."""
    import openai

    options: dict[str, Any] = {
        "base_url": line.base_url,
        "api_key": line.api_key,
        "max_retries": 0,
        "timeout": None,  # the episode has one
    }
    if not inspect.iscoroutinefunction(function):
        web = openai.DefaultHttpxClient(trust_env=False)
        return stack.enter_context(openai.OpenAI(http_client=web, **options))
    web = openai.DefaultAsyncHttpxClient(trust_env=False)
    return await stack.enter_async_context(openai.AsyncOpenAI(http_client=web, **options))
