"""One episode at the endpoint: what was asked and how it was answered, token by token."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorelei.data.chat import ChatTemplate
from lorelei.data.messages import Message
from lorelei.data.tool_call import Tools
from lorelei.env.contract import Sampler
from lorelei.inference.endpoint.protocol import Answer, ChatRequest, Refused
from lorelei.types import Ints, Turn


@dataclass(kw_only=True, eq=False)
class Session:
    """Implements env's Line."""

    base_url: str
    api_key: str
    chat: ChatTemplate
    sample: Sampler
    model: str
    max_turns: int
    failure: Exception | None = None
    _asked: int = 0
    _turns: dict[int, Turn] = field(default_factory=dict[int, Turn])
    # a conversation up to an answer -> how it was sampled
    _answered: dict[str, Turn] = field(default_factory=dict[str, Turn])
    _running: set[asyncio.Task[Any]] = field(default_factory=set[asyncio.Task[Any]])

    @property
    def turns(self) -> tuple[Turn, ...]:
        """See Line."""
        return tuple(self._turns[number] for number in sorted(self._turns))

    def start(self, work: Coroutine[Any, Any, Answer]) -> asyncio.Task[Answer]:
        """Run a completion as a task that ends with the session."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def close(self) -> None:
        """End what is still being sampled."""
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def complete(self, request: ChatRequest) -> Answer:
        """Answer a request. Raises Refused."""
        self._check(request)
        tokens = self._tokens(request)
        number = self._asked
        self._asked += 1
        turn = await self._turn(tokens, number, request)
        if turn.completion.finish_reason == "abort":
            raise Refused("the run ended this completion before it was whole", status=503)
        self._turns[number] = turn
        answer = Answer.of(turn, request, number, self.chat)
        said = answer.message()
        conversation = [*request.messages, {**said, "content": said["content"] or ""}]
        self._answered[_key(conversation, request.offered)] = turn
        return answer

    async def _turn(self, tokens: Ints, number: int, request: ChatRequest) -> Turn:
        try:
            return await self.sample(
                tokens,
                number,
                max_new_tokens=request.most,
                stop_strings=request.stop_strings,
            )
        except ValueError as error:  # it does not fit the context
            raise Refused(str(error), field="messages", code="context_length_exceeded") from error
        except Exception as error:  # the border to the engine: the episode tells the run
            self.failure = error
            raise Refused(f"the rollout engine failed: {error}", status=503) from error

    def _check(self, request: ChatRequest) -> None:
        if request.model != self.model:
            raise Refused(
                f"model: {request.model!r} is not served here; use {self.model!r}",
                status=404,
                field="model",
                code="model_not_found",
            )
        for name, run in self.sample.pinned.items():
            asked = getattr(request, name)
            if asked is not None and asked != run:
                raise Refused(
                    f"{name}: {asked:g} is not the run's {run:g}; in training every token is "
                    "sampled from the distribution that the loss takes it to be from: leave it out"
                    + (", or set rollout.temperature" if name == "temperature" else ""),
                    field=name,
                )
        if self._asked >= self.max_turns:
            raise Refused(
                f"this episode has had its {self.max_turns} completions; raise env.max_turns",
                code="max_turns",
            )

    def _tokens(self, request: ChatRequest) -> Ints:
        messages, at, answer = self._as_sampled(request.messages, request.offered)
        try:
            if request.offered:
                self.chat.tool_format()
            if answer is None:
                return self.chat.prompt(messages, request.offered)
            return self.chat.follow(messages, at, answer, request.offered)
        except ValueError as error:
            raise Refused(str(error), field="messages") from error

    def _as_sampled(
        self, messages: Sequence[Message], tools: Tools
    ) -> tuple[list[Message], int, Turn | None]:
        """The messages with our own answers as they were written, and the last of these."""
        found: list[Message] = list(messages)
        at, last = -1, None
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if (turn := self._answered.get(_key(messages[: number + 1], tools))) is not None:
                found[number] = self.chat.spoken(turn)
                at, last = number, turn
        return found, at, last


def _key(messages: Sequence[Message], tools: Tools) -> str:
    """Equal for equal conversations, however a client spells the JSON of its calls."""
    return json.dumps([list(tools), [_comparable(m) for m in messages]], sort_keys=True)


def _comparable(message: Message) -> dict[str, Any]:
    calls = [call["function"] for call in message.get("tool_calls", ())]
    return {**message, "tool_calls": [[c["name"], _parsed(c["arguments"])] for c in calls]}


def _parsed(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments
