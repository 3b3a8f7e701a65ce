"""Rows of a data set as comparisons: two answers to a prompt, or one with a label.

Pairs have the columns chosen and rejected: texts or lists of one assistant's message behind a
prompt (a column, a chat or task.prompt_template), or whole conversations that differ in the last
message alone. Labelled rows have a prompt, a completion and a label, true or false.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np

from lorelei.algo.preference import CHOSEN, REJECTED
from lorelei.config.errors import shown
from lorelei.config.task import PROMPT_TEMPLATE
from lorelei.data.examples import ExampleRenderer, GivenSource
from lorelei.data.messages import Message, is_message
from lorelei.data.renderer import Messages, NullRow, Renderer, Row, question_key
from lorelei.types import Comparison

PAIR = ("chosen", "rejected")
DATA = "task.path"  # what errors about columns begin with


class ComparisonSource(GivenSource[Comparison]):
    """Comparisons to learn from."""

    def __init__(
        self,
        examples: Sequence[tuple[str, Comparison]],
        *,
        name: str,
        eval_size: int,
        seed: int,
        max_tokens: int,
        notes: Sequence[str] = (),
    ) -> None:
        """max_tokens: of a prompt and an answer. The others: see GivenSource."""
        super().__init__(examples, name=name, eval_size=eval_size, seed=seed, notes=notes)
        self.max_tokens = max_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonRenderer:
    """How the rows of one task become comparisons."""

    examples: ExampleRenderer
    paired: bool  # False: a completion and a label
    _texts: Renderer = field(init=False)  # for prompts that are texts

    def __post_init__(self) -> None:
        texts = replace(self.examples.prompts, prompt_template="{prompt}")
        object.__setattr__(self, "_texts", texts)

    def comparison(self, id: str, row: Row, where: str | None = None) -> tuple[str, Comparison]:
        """(what tells equal questions, the comparison). where: what errors call the row.

        Raises ValueError naming the row and the column.
        """
        where = where or id
        chat, answers, signs = (self._pair if self.paired else self._labelled)(row, where)
        rendered = [self.examples.rendered(row, chat, answer, where) for answer in answers]
        tokens = tuple(answer for _, answer in rendered)
        if len(tokens) > 1 and np.array_equal(tokens[0], tokens[1]):
            raise _same(where)
        made = Comparison(id=id, prompt=rendered[0][0], answers=tokens, signs=signs)
        return question_key(chat), made

    def _pair(self, row: Row, where: str) -> tuple[Messages, list[Message], tuple[int, ...]]:
        held = [row.get(column) for column in PAIR]
        if self.examples.prompts.prompt_template == PROMPT_TEMPLATE and all(map(_whole, held)):
            chat, answers = self._conversations(row, where)
        else:
            chat = self._prompt(row, where)
            answers = [self._answer(row, column, where) for column in PAIR]
        return chat, answers, (CHOSEN, REJECTED)

    def _labelled(self, row: Row, where: str) -> tuple[Messages, list[Message], tuple[int, ...]]:
        chat, answer = self._prompt(row, where), self._answer(row, "completion", where)
        label = self.examples.prompts.held(row, "label", DATA, where)
        if not isinstance(label, bool):
            raise ValueError(
                f"{DATA}: {where}: the column 'label' holds {shown(label)}; it must be true "
                "(desirable) or false"
            )
        return chat, [answer], (CHOSEN if label else REJECTED,)

    def _prompt(self, row: Row, where: str) -> Messages:
        """The chat up to the answers."""
        prompts = self.examples.prompts
        usual = prompts.prompt_template == PROMPT_TEMPLATE and prompts.chat_of(row) is None
        other = "question" in row and "prompt" not in row  # what the usual template names
        return (self._texts if usual and not other else prompts).messages(row, where)

    def _answer(self, row: Row, column: str, where: str) -> Message:
        answer = self.examples.answer_in(row, column, DATA, where)
        if not (answer.get("content") or "").strip() and not answer.get("tool_calls"):
            raise NullRow(
                f"{DATA}: {where}: the column {column!r} is empty; fill it in, or leave such rows "
                "out with task.null_rows: drop"
            )
        return answer

    def _conversations(self, row: Row, where: str) -> tuple[Messages, list[Message]]:
        """The chat that two conversations share, and the answers that they end with."""
        prompts = self.examples.prompts
        chosen, rejected = (prompts.checked_messages(row[column], where) for column in PAIR)
        if chosen == rejected:
            raise _same(where)
        shared = chosen[:-1]
        ends = (chosen[-1]["role"], rejected[-1]["role"]) == ("assistant", "assistant")
        if not ends or shared != rejected[:-1]:
            raise ValueError(
                f"{DATA}: {where}: the conversations in 'chosen' and 'rejected' must be equal up "
                "to the last message, which is the assistant's"
            )
        given = row.get("prompt")
        if given is not None and all(given != m.get("content") for m in shared):
            raise ValueError(
                f"{DATA}: {where}: 'chosen' and 'rejected' are whole conversations, in which the "
                f"column 'prompt', {shown(given)}, is no message; remove it, or leave the answers "
                "alone in them"
            )
        answers = [self._answer({column: row[column][-1:]}, column, where) for column in PAIR]
        return prompts.with_system(prompts.checked(shared, where), where), answers


def mismatched(rows: Sequence[Comparison], max_tokens: int) -> list[Comparison]:
    """Each prompt with the answers of the row before, cut so that both fit into `max_tokens`."""
    others = [*rows[-1:], *rows[:-1]]
    found: list[Comparison] = []
    for row, other in zip(rows, others, strict=True):
        room = max(max_tokens - len(row.prompt), 1)
        answers = tuple(answer[:room] for answer in other.answers)
        found.append(replace(row, answers=answers, signs=other.signs))
    return found


def _whole(value: object) -> bool:
    """Whether it is a conversation, and not an answer alone."""
    if not isinstance(value, list) or not value:
        return False
    first = cast(list[Any], value)[0]
    return is_message(first) and first["role"] != "assistant"


def _same(where: str) -> NullRow:
    return NullRow(
        f"{DATA}: {where}: 'chosen' and 'rejected' are the same; correct it, or leave such rows "
        "out with task.null_rows: drop"
    )
