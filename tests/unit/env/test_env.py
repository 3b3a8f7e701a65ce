"""Environments, with a sampler that answers fixed text: episodes, and what their rewards read."""

from __future__ import annotations

import asyncio
import os
import urllib.request
from typing import Any

import httpx
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from lorelei.config.env import MultiTurnEnv, ToolsEnv
from lorelei.data.chat import ChatTemplate
from lorelei.env.contract import Env, Episode
from lorelei.env.environment import make_env
from lorelei.env.multi_turn import MultiTurn
from lorelei.env.python_file import PythonFile
from lorelei.env.single_turn import SingleTurn
from lorelei.env.tool import load_tool
from lorelei.env.tools import ToolUsing
from lorelei.inference.endpoint.server import HttpEndpoint
from lorelei.reward.contract import RewardResult
from lorelei.reward.pool import RewardPool
from lorelei.types import Completion, FinishReason, Ints, Prompt, Turn
from tests.tiny_models import CHATML

PROMPT = Prompt(
    id="sums/0",
    tokens=np.array([1, 2, 3], np.int32),
    messages=({"role": "user", "content": "1 + 1"},),
    data={"answer": "2"},
)


@pytest.fixture(scope="module")
def chat(tiny_tokenizer: PreTrainedTokenizerFast) -> ChatTemplate:
    return ChatTemplate(tokenizer=tiny_tokenizer, stop_token_ids=(2,))


@pytest.fixture(scope="module")
def env(chat: ChatTemplate):
    pool = RewardPool("math_verify", workers=1)
    yield SingleTurn(reward=pool, chat=chat)
    pool.close()


def play(env: Env, text: str, finish_reason: FinishReason = "stop") -> Episode:
    async def sample(tokens: Ints, turn: int = 0) -> Turn:
        completion = Completion(
            tokens=np.array([7], np.int32),
            logprobs=np.array([-0.5], np.float32),
            versions=((0, 1),),
            finish_reason=finish_reason,
        )
        return Turn(prompt=tokens, completion=completion, text=text)

    return asyncio.run(env.run(PROMPT, sample))


def test_an_episode_is_one_turn_on_the_prompt_with_its_score(env):
    right, wrong = play(env, "2"), play(env, "3")
    assert (right.reward, wrong.reward) == (1.0, 0.0)
    assert [turn.prompt.tolist() for turn in right.turns] == [[1, 2, 3]]
    assert right.turns[0].text == "2"
    assert right.metrics == {"parsed": 1.0}
    assert right.error is None


def test_an_answer_cut_short_by_length_is_scored(env):
    assert play(env, "2", "length").reward == 1.0


def test_an_aborted_answer_is_not_scored(env):
    episode = play(env, "2", "abort")
    assert (episode.reward, episode.error) == (None, "aborted")
    assert len(episode.turns) == 1


def test_a_failed_reward_is_an_episode_with_its_reason(tmp_path, chat):
    path = tmp_path / "rewards.py"
    path.write_text("def f(completion): return None")
    pool = RewardPool("python", path=f"{path}:f", workers=1)
    episode = play(SingleTurn(reward=pool, chat=chat), "2")
    pool.close()
    assert (episode.reward, episode.error) == (None, "not a number: None")
    assert episode.turns[0].text == "2"


# --- what rewards and protocols read


class Echo:
    """A Reward that keeps what it was given."""

    def __init__(self) -> None:
        self.given: list[tuple[dict[str, Any], str]] = []

    async def score(self, prompt_data: Any, completion_text: str) -> RewardResult:
        self.given.append((dict(prompt_data), completion_text))
        return RewardResult(value=1.0)


THINKS = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "1 + 1"}}</tool_call>'
PARTS = {
    "completion_answer": "It is 2",
    "completion_thinking": CALL,
    "completion_prefix": "<think>\n",
}


def say(messages: list[dict[str, str]], turns_left: int) -> None:
    """An environment that lets the run's reward score the first answer."""


def env_of(kind: str, chat: ChatTemplate, reward: Echo) -> Env:
    shared: dict[str, Any] = {"reward": reward, "chat": chat}
    turns: dict[str, Any] = {**shared, "context": 4000, "max_turns": 3}
    match kind:
        case "single_turn":
            return SingleTurn(**shared)
        case "multi_turn":
            return MultiTurn(**turns, feedback="No.", solved=1.0, turn_discount=1.0)
        case "tools":
            tools = {"calculator": load_tool("calculator")}
            return ToolUsing(**turns, tools=tools, timeout=5)
        case _:
            return PythonFile(**turns, step=say, timeout=5)


@pytest.mark.parametrize("kind", ["single_turn", "multi_turn", "tools", "python"])
def test_a_reward_gets_the_whole_answer_and_its_parts(
    kind: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    made = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer,
        eos_token="<|im_end|>",
        chat_template=THINKS,
    )
    chat, reward = ChatTemplate(tokenizer=made, stop_token_ids=(2,)), Echo()
    text = f"{CALL}</think>It is 2"

    async def sample(tokens: Ints, turn: int = 0, **more: Any) -> Turn:
        ids = np.asarray([*made(text)["input_ids"], 2], np.int32)
        done = Completion(
            tokens=ids,
            logprobs=np.zeros(len(ids), np.float32),
            versions=((0, len(ids)),),
            finish_reason="stop",
        )
        return Turn(prompt=tokens, completion=done, text=text)

    ask = {"role": "user", "content": "1 + 1?"}
    prompt = Prompt(id="x", tokens=chat.prompt([ask]), messages=(ask,), data={"answer": "2"})
    episode = asyncio.run(env_of(kind, chat, reward).run(prompt, sample))
    assert len(episode.turns) == 1 and episode.metrics.get("tool_calls", 0.0) == 0.0
    assert reward.given == [({"answer": "2", **PARTS}, text)]


@pytest.mark.parametrize(
    ("env", "template", "reason"),
    [
        (ToolsEnv(kind="tools"), "system", "env.kind: tools: the model's chat template refuses"),
        (ToolsEnv(kind="tools"), "tools", "model: the chat template of .* not known here"),
        (MultiTurnEnv(kind="multi_turn"), "one", "env.kind: multi_turn: the model's chat template"),
    ],
)
def test_a_template_that_refuses_an_environments_messages_is_named_before_the_first_step(
    env: Any, template: str, reason: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    no = "{{ raise_exception('no') }}{% endif %}" + CHATML
    made = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer,
        eos_token="<|im_end|>",
        chat_template={
            "system": "{% if messages[0].role == 'system' %}" + no,
            "one": "{% if messages | length > 1 %}" + no,
            "tools": "{% if tools %}<|tool_list|>{% endif %}" + CHATML,
        }[template],
    )
    chat = ChatTemplate(tokenizer=made, stop_token_ids=(2,))
    with pytest.raises(ValueError, match=reason):
        make_env(env, reward=Echo(), chat=chat, context=4000, endpoint=None, model="x")


@pytest.mark.parametrize("before", [None, "", "example.org"])
def test_no_client_reaches_the_endpoint_by_a_proxy(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        if before is not None:
            monkeypatch.setenv(name, before)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")

    async def serve() -> str:
        endpoint = HttpEndpoint()
        await endpoint.start()
        try:
            for host in ("127.0.0.1", "localhost"):
                assert urllib.request.proxy_bypass(host)
            assert not urllib.request.proxy_bypass("example.com")
            async with httpx.AsyncClient() as client:
                answer = await client.get(f"{endpoint.base_url}/models")
            return str(answer.status_code)
        finally:
            await endpoint.close()

    assert asyncio.run(serve()) == "401"  # it was asked; nobody has the key
    assert os.environ.get("no_proxy") == before
