"""The single-turn environment: one answer, one score."""

from __future__ import annotations

from dataclasses import dataclass

from lorelei.env.contract import Episode, Sampler
from lorelei.reward.contract import Reward
from lorelei.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class SingleTurn:
    """An Env that samples once and scores the text."""

    reward: Reward

    async def run(self, prompt: Prompt, sample: Sampler) -> Episode:
        """See Env. A completion that the engine aborted is not scored: it is no answer."""
        turn = await sample(prompt.tokens)
        if turn.completion.finish_reason == "abort":
            return Episode(turns=(turn,), reward=None, error="aborted")
        result = await self.reward.score(prompt.data, turn.text)
        return Episode(
            turns=(turn,), reward=result.value, error=result.error, metrics=result.metrics
        )
