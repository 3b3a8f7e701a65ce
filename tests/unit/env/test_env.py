"""The single-turn environment, with a real reward and a sampler that answers fixed text."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from lorelei.data.chat import ChatTemplate
from lorelei.env.contract import Env, Episode
from lorelei.env.single_turn import SingleTurn
from lorelei.reward.pool import RewardPool
from lorelei.types import Completion, FinishReason, Ints, Prompt, Turn

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
