"""Rows of a data set as examples to learn from: prompts without loss, answers with it.

A row is a chat that ends with the assistant's message, or a question (columns or a chat) and its
answer.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import numpy as np

from lorelei.config.errors import shown
from lorelei.config.task import ANSWER
from lorelei.data.chat import TemplateRefused
from lorelei.data.contract import item_at, permutation
from lorelei.data.messages import Message
from lorelei.data.renderer import LongRow, Messages, Renderer, Row, question_key
from lorelei.data.rows import EVAL_SEED, first_held_out
from lorelei.types import Example, Ints

T = TypeVar("T")


class GivenSource(Generic[T]):
    """Training examples by index, endlessly, and held-out ones that never occur in them."""

    def __init__(
        self,
        examples: Sequence[tuple[str, T]],
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

    def example(self, index: int) -> T:
        """The example at `index` >= 0: a pure function of (task, seed, index)."""
        return self._train[item_at(index, len(self._train), self._seed)]

    def evaluate_on(self, count: int) -> None:
        """Hold the first `count` of the held-out examples. Raises ValueError for fewer."""
        self.held_out = first_held_out(self.held_out, count)


class ExampleSource(GivenSource[Example]):
    """Examples to imitate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleRenderer:
    """How the rows of one task become examples."""

    prompts: Renderer
    stop_token_ids: tuple[int, ...]
    max_tokens: int  # of a whole example
    all_turns: bool = False  # learn every message of the assistant; False: the answer alone
    weight_field: str | None = None  # the column with a row's weight

    def example(self, id: str, row: Row, where: str | None = None) -> tuple[str, Example]:
        """(what tells equal questions, the example). where: what errors call the row.

        Raises ValueError naming the row.
        """
        where = where or id
        chat, answer = self._split(row, where)
        several = self.all_turns and any(m["role"] == "assistant" for m in chat)
        parts = (
            self._turns(row, chat, answer, where)
            if several
            else [self.rendered(row, chat, answer, where)]
        )
        tokens = np.concatenate([part for both in parts for part in both])
        lengths = [len(part) for both in parts for part in both]
        predicted = np.repeat([False, True] * len(parts), lengths)
        weight = self._weight(row, where)
        made = Example(id=id, tokens=tokens, predicted=predicted, weight=weight)
        return question_key(chat), made

    def rendered(self, row: Row, chat: Messages, answer: Message, where: str) -> tuple[Ints, Ints]:
        """What the model reads, and what it is to write, up to the end of its turn.

        Raises ValueError naming the row, LongRow where one of them is too long.
        """
        prompt, written = self._tokens(row, chat, answer, where)
        # the answer's tokens are those that sampling would have to give behind the prompt's
        learnt = self._until_stop(written)
        self._check_length(len(prompt), len(learnt), where)
        return prompt, learnt

    def _check_length(self, prompt: int, answer: int, where: str) -> None:
        if prompt > self.prompts.max_prompt_tokens:
            raise self.prompts.too_long(where, prompt)
        if prompt + answer > self.max_tokens:
            raise LongRow(
                f"task: {where} has {prompt + answer} tokens, the model reads {self.max_tokens}; "
                "make such rows shorter, or leave them out with task.long_prompts: drop"
            )

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
        return self.answer_in(row, self.prompts.answer_field, "task.answer_field", where)

    def answer_in(self, row: Row, column: str, field: str, where: str) -> Message:
        """The answer in a column: a text, or a chat of one message.

        field: what errors begin with. Raises ValueError for anything else.
        """
        held = self.prompts.held(row, column, field, where)
        if isinstance(held, list):
            messages = self.prompts.checked_messages(cast(list[Any], held), where)
            if len(messages) == 1 and messages[0]["role"] == "assistant":
                return messages[0]
            raise ValueError(
                f"{field}: {where}: the column {column!r} must hold a text, or a list of one "
                "assistant's message"
            )
        return {"role": "assistant", "content": str(held)}

    def _weight(self, row: Row, where: str) -> float:
        if self.weight_field is None:
            return 1.0
        held = self.prompts.held(row, self.weight_field, "algo.weight_field", where)
        number = isinstance(held, int | float) and not isinstance(held, bool)
        if not number or not (held > 0 and math.isfinite(held)):
            raise ValueError(
                f"algo.weight_field: {where}: the column {self.weight_field!r} holds "
                f"{shown(held)}; give a number above 0, or remove the row"
            )
        return float(held)

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
        with self._naming(chat, tools, where):
            return prompts.chat.learnt(chat, answer, tools)

    def _turns(
        self, row: Row, chat: Messages, answer: Message, where: str
    ) -> list[tuple[Ints, Ints]]:
        """What is read before each of the assistant's messages, and what is learnt of it."""
        tools = self.prompts.tools(row, where)
        if not self.prompts.tokenizer.chat_template:
            raise ValueError(
                f"algo.loss_on: {where} has several messages of the assistant, and the model has "
                "no chat template to write them with; use loss_on: answer, or an instruct model"
            )
        parts: list[tuple[Ints, Ints]] = []
        rest = np.zeros(0, np.int32)  # behind the end of the turn before
        with self._naming(chat, tools, where):
            turns = self.prompts.chat.turns([*chat, answer], tools)
        for between, written in turns:
            learnt = self._until_stop(written)
            parts.append((np.concatenate([rest, between]), learnt))
            rest = written[len(learnt) :]
        last = len(parts[-1][1])
        self._check_length(sum(len(part) for both in parts for part in both) - last, last, where)
        return parts

    @contextmanager
    def _naming(self, chat: Messages, tools: Sequence[Any], where: str) -> Generator[None]:
        """What the chat template says, with the row."""
        try:
            yield
        except TemplateRefused as refused:
            raise self.prompts.refusal(refused, chat, tools, where) from refused
        except ValueError as error:
            raise ValueError(f"task: {where}: {error}") from error

    def _until_stop(self, tokens: Ints) -> Ints:
        """Without what a template writes behind the end of a turn: sampling stops there."""
        stops = np.flatnonzero(np.isin(tokens, self.stop_token_ids))
        return tokens[: stops[-1] + 1] if len(stops) else tokens
