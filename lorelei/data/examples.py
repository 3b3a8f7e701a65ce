"""Rows of a data set as examples to learn from: prompts without loss, answers with it.

A row is a chat that ends with the assistant's message, or a question (columns or a chat) and its
answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from lorelei.config.task import ANSWER
from lorelei.data.chat import TemplateRefused
from lorelei.data.contract import item_at, permutation
from lorelei.data.messages import Message
from lorelei.data.renderer import LongRow, Messages, Renderer, Row, question_key
from lorelei.data.rows import EVAL_SEED, first_held_out
from lorelei.types import Example, Ints


class ExampleSource:
    """Training examples by index, endlessly, and held-out ones that never occur in them."""

    def __init__(
        self,
        examples: Sequence[tuple[str, Example]],
        *,
        name: str,
        eval_size: int,
        seed: int,
        notes: Sequence[str] = (),
    ) -> None:
        """examples: with what tells equal questions. notes: lines about rows left out.

        Raises ValueError when none is left.
        """
        self.notes = tuple(notes)
        order = [examples[int(i)] for i in permutation(len(examples), EVAL_SEED, 0)]
        questions = {question for question, _ in order[:eval_size]}
        self._seed = seed
        self.held_out = [example for _, example in order[:eval_size]]
        self._train = [example for question, example in order if question not in questions]
        if not self._train:
            raise ValueError(
                f"task.eval_size: {eval_size} held-out rows leave none of the {len(examples)} rows "
                f"of {name} for training; lower it"
            )

    def example(self, index: int) -> Example:
        """The example at `index` >= 0: a pure function of (task, seed, index)."""
        return self._train[item_at(index, len(self._train), self._seed)]

    def evaluate_on(self, count: int) -> None:
        """Hold the first `count` of the held-out examples. Raises ValueError for fewer."""
        self.held_out = first_held_out(self.held_out, count)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleRenderer:
    """How the rows of one task become examples."""

    prompts: Renderer
    stop_token_ids: tuple[int, ...]
    max_tokens: int  # of a whole example

    def example(self, id: str, row: Row, where: str | None = None) -> tuple[str, Example]:
        """(what tells equal questions, the example). where: what errors call the row.

        Raises ValueError naming the row.
        """
        where = where or id
        chat, answer = self._split(row, where)
        prompt, written = self._tokens(row, chat, answer, where)
        if len(prompt) > self.prompts.max_prompt_tokens:
            raise self.prompts.too_long(where, len(prompt))
        # the answer's tokens are those that sampling would have to give behind the prompt's
        learnt = self._until_stop(written)
        tokens = np.concatenate([prompt, learnt])
        if len(tokens) > self.max_tokens:
            raise LongRow(
                f"task: {where} has {len(tokens)} tokens, the model reads {self.max_tokens}; make "
                "such rows shorter, or leave them out with task.long_prompts: drop"
            )
        predicted = np.arange(len(tokens)) >= len(prompt)
        return question_key(chat), Example(id=id, tokens=tokens, predicted=predicted)

    def _split(self, row: Row, where: str) -> tuple[Messages, Message]:
        """The chat up to the answer, and the answer."""
        prompts = self.prompts
        whole = prompts.chat_of(row)
        if whole is None:
            return prompts.messages(row, where), self._answer(row, where)
        chat = prompts.checked_messages(whole, where)
        ends = bool(chat) and chat[-1]["role"] == "assistant"
        if not ends and prompts.answer_field in row:
            return prompts.messages(row, where), self._answer(row, where)
        if not ends:
            raise ValueError(
                f"task: the chat of {where} must end with the assistant's message, which is learnt"
            )
        if prompts.answer_field != ANSWER:
            raise ValueError(
                f"task.answer_field: {where} has a chat that ends with an answer of its own; "
                f"remove {prompts.answer_field!r}, or name the columns of the prompt in "
                "task.prompt_template"
            )
        before = prompts.with_system(prompts.checked(whole[:-1], where), where)
        return before, chat[-1]

    def _answer(self, row: Row, where: str) -> Message:
        """The answer of a row with a column for it: a text, or a chat of one message."""
        held = self.prompts.answer(row, where)
        if isinstance(held, list):
            messages = self.prompts.checked_messages(cast(list[Any], held), where)
            if len(messages) == 1 and messages[0]["role"] == "assistant":
                return messages[0]
            raise ValueError(
                f"task.answer_field: {where}: the column {self.prompts.answer_field!r} must hold a "
                "text, or a list of one assistant's message"
            )
        return {"role": "assistant", "content": str(held)}

    def _tokens(self, row: Row, chat: Messages, answer: Message, where: str) -> tuple[Ints, Ints]:
        """What the model reads, and what it is to write."""
        prompts = self.prompts
        tools, tokenizer = prompts.tools(row, where), prompts.tokenizer
        if not tokenizer.chat_template:
            before = prompts.tokens(chat, tools, where)
            controls = prompts.chat.controls
            text = controls.guard(answer["content"]) + str(tokenizer.eos_token or "")
            after = controls.encode(text, add_special_tokens=True)
            return before, np.asarray(after, np.int32)
        try:
            return prompts.chat.learnt(chat, answer, tools)
        except TemplateRefused as refused:
            raise prompts.refusal(refused, chat, tools, where) from refused
        except ValueError as error:
            raise ValueError(f"task: {where}: {error}") from error

    def _until_stop(self, tokens: Ints) -> Ints:
        """Without what a template writes behind the end of a turn: sampling stops there."""
        stops = np.flatnonzero(np.isin(tokens, self.stop_token_ids))
        return tokens[: stops[-1] + 1] if len(stops) else tokens
