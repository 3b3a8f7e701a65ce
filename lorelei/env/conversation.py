"""One episode as it goes: its messages, and the tokens that the model reads and writes.

Shapes: P prompt tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from lorelei.data.chat import ChatTemplate
from lorelei.data.messages import Message
from lorelei.data.tool_call import Tools
from lorelei.env.contract import Sampler
from lorelei.types import Ints, Prompt, Turn


class Conversation:
    """Starts on a prompt; then answers and messages alternate."""

    def __init__(self, chat: ChatTemplate, prompt: Prompt, tools: Tools = ()) -> None:
        """Raises ValueError when the template refuses the tools."""
        self.messages: list[Message] = [dict(m) for m in prompt.messages]
        self.turns: list[Turn] = []
        self.tokens: Ints = chat.prompt(self.messages, tools) if tools else prompt.tokens
        self._chat, self._tools = chat, tools or prompt.tools

    async def answer(self, sample: Sampler) -> Turn:
        """Let the model speak. Raises what the rollout engine raises."""
        turn = await sample(self.tokens, len(self.turns))
        self.turns.append(turn)
        self.messages.append(self._chat.spoken(turn))
        return turn

    def tell(self, messages: Sequence[Message]) -> None:
        """Say something to the model after its answer. Raises ValueError like the template."""
        at = len(self.messages) - 1
        self.messages.extend(messages)
        self.tokens = self._chat.follow(self.messages, at, self.turns[-1], self._tools)
