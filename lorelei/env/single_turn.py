"""The single-turn environment: one answer, one score."""

from __future__ import annotations

from dataclasses import dataclass

from lorelei.data.chat import ChatTemplate
from lorelei.env.contract import Episode, Sampler
from lorelei.env.user_code import score
from lorelei.reward.contract import Reward
from lorelei.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class SingleTurn:
    """An Env that samples once and scores the text."""

    reward: Reward
    chat: ChatTemplate

    async def run(self, prompt: Prompt, sample: Sampler) -> Episode:
        """See Env. A completion that the engine aborted is not scored: it is no answer."""
        turn = await sample(prompt.tokens)
        if turn.completion.finish_reason == "abort":
            return Episode(turns=(turn,), reward=None, error="aborted")
        result = await score(self.reward, prompt, self.chat.reply(turn))
        return Episode(
            turns=(turn,), reward=result.value, error=result.error, metrics=result.metrics
        )
