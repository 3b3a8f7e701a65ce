"""What an episode of users' code comes to."""

from __future__ import annotations

from lorelei.env.contract import Episode
from lorelei.reward.contract import Reward, RewardResult
from lorelei.reward.score import read_score
from lorelei.types import Prompt, Turn


class NoReward:
    """The Reward of a run whose environment gives the reward itself."""

    async def score(self, prompt_data: object, completion_text: str) -> RewardResult:
        """See Reward: none, with the reason."""
        return RewardResult(
            value=None, error="no reward: the environment gave none, and reward.kind is env"
        )


def given(turns: tuple[Turn, ...], score: object) -> Episode:
    """An episode with a number or (number, {metric: number}). Raises ValueError for neither."""
    value, metrics = read_score(score)
    return Episode(turns=turns, reward=value, metrics={**metrics, "turns": float(len(turns))})


async def scored(turns: tuple[Turn, ...], prompt: Prompt, reward: Reward, text: str) -> Episode:
    """An episode whose text the run's reward scores."""
    result = await reward.score(prompt.data, text)
    return Episode(
        turns=turns,
        reward=result.value,
        error=result.error,
        metrics={**result.metrics, "turns": float(len(turns))},
    )
