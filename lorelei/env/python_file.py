"""An environment in a user's Python file: a function says what follows each answer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from lorelei.config.errors import shown
from lorelei.data.chat import ChatTemplate
from lorelei.data.messages import Message, is_message
from lorelei.env.contract import Episode, Sampler
from lorelei.env.conversation import Conversation
from lorelei.env.user_code import call_within, given, scored
from lorelei.reward.contract import Reward
from lorelei.types import Prompt
from lorelei.user_file import accepted


@dataclass(frozen=True, slots=True, kw_only=True)
class PythonFile:
    """An Env around `step(messages, data)`, async or not, called after every answer.

    It is given what it names of `messages` (the answer is the last), `data` (this episode's own
    copy of Prompt.data: what it writes there it finds again) and `turns_left`. It returns:

    - a text, a message or a list of messages: the model answers again;
    - a number or (number, {metric: number}): the reward, and the end;
    - None: the end, and the run's reward scores the last answer.

    Where no turn is left, the run's reward scores the last answer whatever it says next.
    """

    step: Callable[..., Any]
    reward: Reward
    chat: ChatTemplate
    context: int  # most tokens of a sequence
    max_turns: int
    timeout: float  # seconds for one call

    async def run(self, prompt: Prompt, sample: Sampler) -> Episode:
        """See Env. Raises what the function raises."""
        talk = Conversation(self.chat, prompt)
        data = copy.deepcopy(dict(prompt.data))
        while True:
            turn = await talk.answer(sample)
            turns = tuple(talk.turns)
            if turn.completion.finish_reason == "abort":
                return Episode(turns=turns, reward=None, error="aborted")
            left = self.max_turns - len(turns)
            values = {"messages": list(talk.messages), "data": data, "turns_left": left}
            said = await call_within(self.timeout, self.step, **accepted(self.step, values))
            if said is None:
                break
            messages = _messages(said)
            if messages is None:
                return given(turns, said)
            if left == 0:
                break
            talk.tell(messages)
            if len(talk.tokens) >= self.context:
                break
        return await scored(turns, prompt, self.reward, self.chat.reply(turn))


def _messages(said: object) -> list[Message] | None:
    """What follows an answer; None for what is not messages."""
    if isinstance(said, str):
        return [{"role": "user", "content": said}]
    if not isinstance(said, list | Mapping):
        return None
    messages: list[Message] = []
    for message in cast(list[object], said if isinstance(said, list) else [said]):
        if not is_message(message):
            raise ValueError(
                f"env.path: the function returned the message {shown(message)}; "
                "each needs the strings 'role' and 'content'"
            )
        messages.append(dict(message))
    return messages
