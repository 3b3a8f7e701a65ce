"""The endpoint, as OpenAI's own client sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from transformers import PreTrainedTokenizerFast

from lorelei.data.chat import ChatTemplate
from lorelei.inference.endpoint.server import MAX_BODY, HttpEndpoint
from lorelei.inference.endpoint.session import Session
from lorelei.types import Completion, Ints, Turn

ASK = [{"role": "user", "content": "What is 12 + 30?"}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'


class Says:
    """A Sampler whose answers are fixed texts, in single letters."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *texts: str) -> None:
        self.pinned: Mapping[str, float] = {"temperature": 0.7, "top_p": 1.0}
        self.asked: list[dict[str, Any]] = []
        self.hangs = False
        self._tokenizer, self._texts = tokenizer, texts

    async def __call__(
        self,
        tokens: Ints,
        turn: int = 0,
        *,
        max_new_tokens: int | None = None,
        stop_strings: Sequence[str] = (),
    ) -> Turn:
        self.asked.append({"tokens": tokens, "most": max_new_tokens, "stop": tuple(stop_strings)})
        if self.hangs:
            await asyncio.sleep(60)
        if len(tokens) > 1500:
            raise ValueError("the prompt has too many tokens")
        text = self._texts[turn % len(self._texts)]
        said = [i for c in text for i in self._tokenizer(c)["input_ids"]] + [2]
        completion = Completion(
            tokens=np.array(said, np.int32),
            logprobs=np.zeros(len(said), np.float32),
            versions=((0, len(said)),),
            finish_reason="stop",
        )
        return Turn(prompt=tokens, completion=completion, text=text)


Talk = Callable[[openai.AsyncOpenAI, Session], Coroutine[Any, Any, None]]


@pytest.fixture
def talk(tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., None]:
    """Runs a conversation with a sampler that answers the given texts."""

    def talk(body: Talk, *texts: str, says: Says | None = None) -> None:
        asyncio.run(
            asyncio.wait_for(_talk(tiny_tokenizer, body, says or Says(tiny_tokenizer, *texts)), 20)
        )

    return talk


async def _talk(tokenizer: PreTrainedTokenizerFast, body: Talk, says: Says) -> None:
    endpoint = HttpEndpoint()
    chat = ChatTemplate(tokenizer=tokenizer, stop_token_ids=(2,))
    await endpoint.start()
    try:
        async with endpoint.open(says, "mine", 3, chat) as line:
            options = {"base_url": line.base_url, "api_key": line.api_key, "max_retries": 0}
            async with openai.AsyncOpenAI(**options) as client:
                await body(client, line)
    finally:
        await endpoint.close()


async def ask(client: openai.AsyncOpenAI, **fields: Any) -> Any:
    return await client.chat.completions.create(**{"model": "mine", "messages": ASK, **fields})


def test_a_conversation_goes_on_with_the_tokens_that_were_sampled(talk) -> None:
    async def body(client: openai.AsyncOpenAI, line: Session) -> None:
        first = await ask(client)
        assert first.choices[0].message.content == "The sum"
        assert first.choices[0].finish_reason == "stop"
        assert first.usage.completion_tokens == len(line.turns[0].completion.tokens)
        parts = [{"type": "text", "text": "Go on."}]
        more = [*ASK, first.choices[0].message, {"role": "user", "content": parts}]
        await ask(client, messages=more)
        one, two = line.turns
        said = [*one.prompt.tolist(), *one.completion.tokens.tolist()]
        assert two.prompt.tolist()[: len(said)] == said
        # another text in its place is another conversation, and is tokenised as it stands
        other = [*ASK, {"role": "assistant", "content": "The"}, {"role": "user", "content": "?"}]
        await ask(client, messages=other)
        assert line.turns[2].prompt.tolist()[: len(said)] != said

    talk(body, "The sum", "is 42")


def test_tool_calls_are_openais_and_come_back_as_they_were_written(talk) -> None:
    async def body(client: openai.AsyncOpenAI, line: Session) -> None:
        choice = (await ask(client, tools=TOOLS)).choices[0]
        (call,) = choice.message.tool_calls
        assert (call.function.name, call.function.arguments) == ("add", '{"a": 1}')
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        result = {"role": "tool", "tool_call_id": call.id, "content": "2"}
        await ask(client, tools=TOOLS, messages=[*ASK, choice.message, result])
        one, two = line.turns
        said = [*one.prompt.tolist(), *one.completion.tokens.tolist()]
        assert two.prompt.tolist()[: len(said)] == said
        plain = (await ask(client)).choices[0]
        assert plain.message.tool_calls is None and plain.message.content == CALL

    talk(body, CALL)


def test_a_stream_says_the_same(talk) -> None:
    async def body(client: openai.AsyncOpenAI, line: Session) -> None:
        pieces = [
            chunk
            async for chunk in await ask(
                client, stream=True, stream_options={"include_usage": True}
            )
        ]
        texts = [c.choices[0].delta.content or "" for c in pieces if c.choices]
        assert "".join(texts) == "The sum"
        assert pieces[1].choices[0].finish_reason == "stop"
        assert pieces[-1].usage.prompt_tokens == len(line.turns[0].prompt)

    talk(body, "The sum")


def test_limits_and_stops_reach_the_sampler_and_the_stop_is_cut_off(talk, tiny_tokenizer) -> None:
    says = Says(tiny_tokenizer, "The sum. It")

    async def body(client: openai.AsyncOpenAI, line: Session) -> None:
        answer = await ask(client, max_tokens=5, stop=".", temperature=0.7, user="me", n=1)
        assert answer.choices[0].message.content == "The sum"
        assert (says.asked[0]["most"], says.asked[0]["stop"]) == (5, (".",))
        assert (await client.models.list()).data[0].id == "mine"

    talk(body, says=says)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 0.2}, "temperature: 0.2 is not the run's 0.7"),
        ({"top_p": 0.9}, "top_p: 0.9 is not the run's 1"),
        ({"n": 2}, "n: 2 is refused; use 1"),
        ({"response_format": {"type": "json_object"}}, "response_format: .* is refused"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"extra_body": {"temprature": 1}}, "temprature: is unknown here; .*'temperature'"),
        ({"model": "gpt-4"}, "model: 'gpt-4' is not served here; use 'mine'"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "is not text"),
        ({"messages": [{"role": "user", "content": "x" * 2000}]}, "too many tokens"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_a_request_that_cannot_be_answered_names_its_field(talk, fields, message: str) -> None:
    async def body(client: openai.AsyncOpenAI, line: Session) -> None:
        with pytest.raises(openai.APIStatusError, match=message) as caught:
            await ask(client, **fields)
        assert caught.value.status_code == (404 if "model" in fields else 400)
        assert line.turns == () and line.failure is None

    talk(body, "The sum")


def test_only_a_running_episode_is_served_and_no_more_than_its_turns(talk, tiny_tokenizer) -> None:
    says = Says(tiny_tokenizer, "The sum")

    async def body(client: openai.AsyncOpenAI, line: Session) -> None:
        with pytest.raises(openai.AuthenticationError, match="no running episode"):
            await ask(client.with_options(api_key="another"))
        for _ in range(3):
            await ask(client)
        with pytest.raises(openai.BadRequestError, match="has had its 3 completions"):
            await ask(client)

    talk(body, says=says)
    assert len(says.asked) == 3


def test_a_body_that_is_too_large_is_not_read(talk) -> None:
    async def body(client: openai.AsyncOpenAI, line: Session) -> None:
        headers = {"Authorization": f"Bearer {line.api_key}"}
        async with httpx.AsyncClient(trust_env=False, headers=headers) as web:
            url = f"{line.base_url}/chat/completions"
            assert (await web.post(url, content=b" " * (MAX_BODY + 1))).status_code == 413
            assert (await web.post(url, content=b"{")).status_code == 400

    talk(body, "The sum")


def test_a_client_that_goes_away_leaves_no_turn(talk, tiny_tokenizer) -> None:
    says = Says(tiny_tokenizer, "The sum")
    says.hangs = True

    async def body(client: openai.AsyncOpenAI, line: Session) -> None:
        with pytest.raises(openai.APITimeoutError):
            await ask(client, timeout=0.2)
        says.hangs = False
        await ask(client)
        assert len(line.turns) == 1

    talk(body, says=says)


def test_an_engine_that_fails_is_told_to_the_run(talk, tiny_tokenizer) -> None:
    class Broken(Says):
        async def __call__(self, *tokens: Any, **fields: Any) -> Turn:
            raise RuntimeError("it died")

    async def body(client: openai.AsyncOpenAI, line: Session) -> None:
        with pytest.raises(openai.InternalServerError, match="it died"):
            await ask(client)
        assert isinstance(line.failure, RuntimeError)

    talk(body, says=Broken(tiny_tokenizer, ""))
