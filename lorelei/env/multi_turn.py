"""The multi-turn environment: a wrong answer may be tried again."""

from __future__ import annotations

from dataclasses import dataclass

from lorelei.data.chat import ChatTemplate
from lorelei.env.contract import Episode, Sampler
from lorelei.env.conversation import Conversation
from lorelei.env.user_code import score
from lorelei.reward.contract import Reward
from lorelei.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiTurn:
    """An Env that says `feedback` to a wrong answer, until one is right or the turns are over.

    The reward is the last answer's score, discounted for every turn before it. Metrics: those of
    the last answer, `turns`, and `first`, the score of the first answer.
    """

    reward: Reward
    chat: ChatTemplate
    context: int  # most tokens of a sequence
    max_turns: int
    feedback: str
    solved: float
    turn_discount: float

    async def run(self, prompt: Prompt, sample: Sampler) -> Episode:
        """See Env."""
        talk = Conversation(self.chat, prompt)
        scores: list[float] = []
        while True:
            turn = await talk.answer(sample)
            if turn.completion.finish_reason == "abort":
                return Episode(turns=tuple(talk.turns), reward=None, error="aborted")
            result = await score(self.reward, prompt, self.chat.reply(turn))
            if result.value is None:
                return Episode(turns=tuple(talk.turns), reward=None, error=result.error)
            scores.append(result.value)
            if result.value >= self.solved or len(scores) == self.max_turns:
                break
            talk.tell([{"role": "user", "content": self.feedback}])
            if len(talk.tokens) >= self.context:
                break
        counts = {"turns": float(len(scores)), "first": scores[0]}
        return Episode(
            turns=tuple(talk.turns),
            reward=scores[-1] * self.turn_discount ** (len(scores) - 1),
            metrics={**result.metrics, **counts},
        )
