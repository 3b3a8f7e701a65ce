"""Rows of a data set as examples to learn from: prompts without loss, answers with it.

A row is a chat that ends with the assistant's message, or the columns of a question and its answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from lorelei.config.errors import nearest
from lorelei.data.contract import item_at, permutation
from lorelei.data.renderer import Renderer, chat_of, question_key
from lorelei.data.rows import EVAL_SEED, first_held_out
from lorelei.types import Example, Ints

Row = Mapping[str, Any]
Chat = list[dict[str, str]]


class ExampleSource:
    """Training examples by index, endlessly, and held-out ones that never occur in them."""

    def __init__(
        self, examples: Sequence[tuple[str, Example]], *, name: str, eval_size: int, seed: int
    ) -> None:
        """examples: with what tells equal questions. Raises ValueError when none is left."""
        if not examples:
            raise ValueError(f"task: {name} has no rows")
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

    def example(self, where: str, row: Row) -> tuple[str, Example]:
        """(what tells equal questions, the example). Raises ValueError naming the row."""
        chat, answer = self._split(where, row)
        prompt_text, answer_text = self._texts(where, chat, answer)
        prompt = self._tokens(prompt_text)
        if len(prompt) > self.prompts.max_prompt_tokens:
            raise ValueError(
                f"task.max_prompt_tokens: the prompt of {where} has {len(prompt)} tokens, the "
                f"limit is {self.prompts.max_prompt_tokens}; raise it or make such rows shorter"
            )
        # the answer's tokens are those that sampling would have to give behind the prompt's
        learnt = self._until_stop(self._tokens(answer_text))
        tokens = np.concatenate([prompt, learnt])
        if len(tokens) > self.max_tokens:
            raise ValueError(
                f"task: {where} has {len(tokens)} tokens, the model reads {self.max_tokens}; make "
                "such rows shorter"
            )
        predicted = np.arange(len(tokens)) >= len(prompt)
        return question_key(tuple(chat)), Example(id=where, tokens=tokens, predicted=predicted)

    def _split(self, where: str, row: Row) -> tuple[Chat, str]:
        """The chat up to the answer, and the answer."""
        whole = chat_of(row)
        if whole is None:
            field = self.prompts.answer_field
            if field not in row:
                raise ValueError(
                    f"task.answer_field: {where} has no column {field!r}; {nearest(field, row)}"
                )
            return [dict(m) for m in self.prompts.messages(row, where)], str(row[field])
        last: Row = cast(Row, whole[-1]) if whole and isinstance(whole[-1], Mapping) else {}
        if last.get("role") != "assistant" or not isinstance(last.get("content"), str):
            raise ValueError(
                f"task: the chat of {where} must end with the assistant's message, which is learnt"
            )
        before = self.prompts.messages({**row, "messages": whole[:-1]}, where)
        return [dict(m) for m in before], last["content"]

    def _texts(self, where: str, chat: Chat, answer: str) -> tuple[str, str]:
        """What the model reads, and what it is to write."""
        tokenizer = self.prompts.tokenizer
        if not tokenizer.chat_template:
            return "\n\n".join(m["content"] for m in chat), answer + str(tokenizer.eos_token or "")
        before = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(
            [*chat, {"role": "assistant", "content": answer}], tokenize=False
        )
        if not str(whole).startswith(str(before)):
            raise ValueError(
                f"task: the model's chat template writes {where} with the answer in another way "
                "than without it, so that its beginning cannot be told"
            )
        return str(before), str(whole)[len(str(before)) :]

    def _tokens(self, text: str) -> Ints:
        plain = bool(self.prompts.tokenizer.chat_template)  # a template writes its own
        ids = self.prompts.tokenizer(text, add_special_tokens=not plain)["input_ids"]
        return np.asarray(ids, dtype=np.int32)

    def _until_stop(self, tokens: Ints) -> Ints:
        """Without what a template writes behind the end of a turn: sampling stops there."""
        stops = np.flatnonzero(np.isin(tokens, self.stop_token_ids))
        return tokens[: stops[-1] + 1] if len(stops) else tokens
