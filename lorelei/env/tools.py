"""The tool-using environment: the model may call tools before it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lorelei.data.chat import ChatTemplate, call_id
from lorelei.env.contract import Episode, Sampler
from lorelei.env.conversation import Conversation
from lorelei.env.tool import Tool, use_all
from lorelei.env.user_code import score
from lorelei.reward.contract import Reward
from lorelei.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUsing:
    """An Env that answers tool calls; the first answer without one is scored, or the last of all.

    Metrics: the score's, `turns`, `tool_calls` and `tool_errors`.
    """

    reward: Reward
    chat: ChatTemplate
    context: int  # most tokens of a sequence
    max_turns: int
    tools: Mapping[str, Tool]
    timeout: float  # seconds for one call

    async def run(self, prompt: Prompt, sample: Sampler) -> Episode:
        """See Env."""
        described = [tool.description for tool in self.tools.values()]
        talk = Conversation(self.chat, prompt, described)
        made = failed = 0
        while True:
            turn = await talk.answer(sample)
            if turn.completion.finish_reason == "abort":
                return Episode(turns=tuple(talk.turns), reward=None, error="aborted")
            _, calls = self.chat.calls(turn, described)
            if not calls or len(talk.turns) == self.max_turns:
                break
            replies = await use_all(calls, self.tools, self.timeout)
            talk.tell(
                [
                    {"role": "tool", "name": call.name, "content": text, "tool_call_id": call_id(n)}
                    for n, (call, (text, _)) in enumerate(zip(calls, replies, strict=True), made)
                ]
            )
            made, failed = made + len(calls), failed + sum(not worked for _, worked in replies)
            if len(talk.tokens) >= self.context:
                break
        result = await score(self.reward, prompt, self.chat.reply(turn))
        counts = {"turns": len(talk.turns), "tool_calls": made, "tool_errors": failed}
        return Episode(
            turns=tuple(talk.turns),
            reward=result.value,
            error=result.error,
            metrics={**result.metrics, **{name: float(n) for name, n in counts.items()}},
        )
