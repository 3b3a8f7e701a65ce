"""Rows of a dataset as a PromptSource."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from lorelei.data.contract import item_at, permutation
from lorelei.data.renderer import Renderer, question_key
from lorelei.types import Prompt

T = TypeVar("T")

# The held-out rows are the same whatever the seed, so that runs can be compared.
EVAL_SEED = 0


class RowSource:
    """Training prompts from rows in memory, without the held-out ones and their duplicates."""

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        name: str,
        renderer: Renderer,
        eval_size: int,
        seed: int,
    ) -> None:
        """`name` names the data in ids and errors. Every row is rendered here, before any work.

        Raises ValueError for a row that cannot be rendered, or when none is left for training.
        """
        if not rows:
            raise ValueError(f"task: {name} has no rows")
        self._seed = seed
        rendered = [renderer.prompt(f"{name}/{i}", row) for i, row in enumerate(rows)]
        order = [rendered[int(i)] for i in permutation(len(rows), EVAL_SEED, 0)]
        self._held_out = order[:eval_size]
        held_out_keys = {question_key(p.messages) for p in self._held_out}
        self._train = [p for p in order if question_key(p.messages) not in held_out_keys]
        if not self._train:
            raise ValueError(
                f"task.eval_size: {eval_size} held-out rows leave none of the {len(rows)} rows of "
                f"{name} for training; lower it"
            )

    def prompt(self, index: int) -> Prompt:
        """See PromptSource."""
        return self._train[item_at(index, len(self._train), self._seed)]

    def eval_prompts(self, n: int) -> list[Prompt]:
        """See PromptSource."""
        return first_held_out(self._held_out, n)


def first_held_out(held_out: list[T], n: int) -> list[T]:
    """The first `n`, or a ValueError when there are fewer."""
    if n > len(held_out):
        raise ValueError(
            f"task.eval_size: {n} held-out prompts are asked for and {len(held_out)} are held out; "
            "raise it"
        )
    return held_out[:n]
