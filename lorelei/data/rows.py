"""Rows of a dataset as a PromptSource."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from lorelei.config.errors import nearest
from lorelei.config.task import ANSWER
from lorelei.data.contract import item_at, permutation
from lorelei.data.reader import Table
from lorelei.data.renderer import LongRow, NullRow, Renderer, question_key
from lorelei.types import Prompt

T = TypeVar("T")
Choice = Literal["refuse", "drop"]

# The held-out rows are the same whatever the seed, so that runs can be compared.
EVAL_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfit:
    """What becomes of rows that cannot be used."""

    long: Choice = "refuse"
    null: Choice = "refuse"


class RowSource:
    """Training prompts from rows in memory, without the held-out ones and their duplicates."""

    def __init__(
        self, table: Table, *, renderer: Renderer, eval_size: int, seed: int, unfit: Unfit
    ) -> None:
        """Every row is rendered here, before any work.

        Raises ValueError for a row that cannot be rendered, or when none is left for training.
        """
        self._seed = seed
        if renderer.answers != "needed":
            renderer = replace(renderer, answers=_answers(table, renderer.answer_field))
        rendered, self.notes = usable(table, renderer.prompt, unfit)
        order = [rendered[int(i)] for i in permutation(len(rendered), EVAL_SEED, 0)]
        self._held_out = order[:eval_size]
        held_out_keys = {question_key(p.messages) for p in self._held_out}
        self._train = [p for p in order if question_key(p.messages) not in held_out_keys]
        if not self._train:
            raise ValueError(
                f"task.eval_size: {eval_size} held-out rows leave none of the {len(rendered)} rows "
                f"of {table.name} for training; lower it"
            )

    def prompt(self, index: int) -> Prompt:
        """See PromptSource."""
        return self._train[item_at(index, len(self._train), self._seed)]

    def eval_prompts(self, n: int) -> list[Prompt]:
        """See PromptSource."""
        return first_held_out(self._held_out, n)


def usable(
    table: Table, render: Callable[[str, Mapping[str, Any], str], T], unfit: Unfit
) -> tuple[list[T], tuple[str, ...]]:
    """What `render` makes of (id, row, what errors call it), and lines about rows left out.

    Raises ValueError for the first row that cannot be used, with the number of further ones.
    """
    if not table.rows:
        raise ValueError(f"task: {table.name} has no rows")
    left = {"long": _Left(choice=unfit.long), "null": _Left(choice=unfit.null)}
    rendered: list[T] = []
    for i, row in enumerate(table.rows):
        try:
            rendered.append(render(f"{table.name}/{i}", row, table.where(i)))
        except LongRow as error:
            left["long"].add(error, table.number(i))
        except NullRow as error:
            left["null"].add(error, table.number(i))
    for one in left.values():
        one.refuse()
    if not rendered:
        first = next(one.first for one in left.values() if one.first is not None)
        raise ValueError(f"task: all {len(table.rows)} rows of {table.name} are left out: {first}")
    words = {"long": "over task.max_prompt_tokens", "null": "with a null or empty column"}
    total = len(table.rows)
    notes = [one.note(words[kind], total, table) for kind, one in left.items() if one.numbers]
    return rendered, tuple(notes)


@dataclass(slots=True, kw_only=True)
class _Left:
    """Rows of one kind that cannot be used."""

    choice: Choice
    first: ValueError | None = None
    numbers: list[int] = field(default_factory=list[int])

    def add(self, error: ValueError, number: int) -> None:
        self.first = self.first or error
        self.numbers.append(number)

    def refuse(self) -> None:
        if self.first is not None and self.choice == "refuse":
            more = len(self.numbers) - 1
            raise ValueError(f"{self.first} (and {more} more rows)" if more else str(self.first))

    def note(self, words: str, total: int, table: Table) -> str:
        listed = ", ".join(map(str, self.numbers[:5])) + (", ..." if len(self.numbers) > 5 else "")
        count = len(self.numbers)
        return f"{count} of {total} rows of {table.name} left out, {words}: {table.unit} {listed}"


def _answers(table: Table, column: str) -> Literal["given", "none"]:
    """Whether rows whose reward needs no answers have some.

    Without answers a data set is what it is; where some rows have one, the others lack theirs.
    Raises ValueError for a column that was named and that no row has.
    """
    if any(row.get(column) is not None for row in table.rows):
        return "given"
    if column != ANSWER and table.rows:
        known = set[str]().union(*(row.keys() for row in table.rows[:100]))
        why = "is null in every row" if column in known else nearest(column, known)
        raise ValueError(f"task.answer_field: {table.name} has no column {column!r}; {why}")
    return "none"


def first_held_out(held_out: list[T], n: int) -> list[T]:
    """The first `n`, or a ValueError when there are fewer."""
    if n > len(held_out):
        raise ValueError(
            f"task.eval_size: {n} held-out prompts are asked for and {len(held_out)} are held out; "
            "raise it"
        )
    return held_out[:n]
