"""From groups of rollouts to a batch of segments and items. Numpy only.

Shapes: P prompt tokens, T completion tokens, I items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lorelei.train.layout import Piece, join
from lorelei.types import Batch, Floats, Ints, Items, Rollout, Segment


@dataclass(slots=True)
class _Row:
    """One token row of a rollout; a turn that continues an earlier row extends it."""

    tokens: Ints
    predicted: list[tuple[int, int]]  # completions as [start, stop) in the row
    behaviour: list[Floats]


@dataclass(slots=True)
class _Columns:
    source: list[np.ndarray] = field(default_factory=list[np.ndarray])
    target: list[np.ndarray] = field(default_factory=list[np.ndarray])
    behaviour: list[np.ndarray] = field(default_factory=list[np.ndarray])
    sequence: list[np.ndarray] = field(default_factory=list[np.ndarray])


def build_batch(
    adapter: str,
    groups: Sequence[Sequence[Rollout]],
    advantages: Sequence[Floats],
    temperature: float,
) -> Batch:
    """The batch of one adapter; weights are left at 1 for the caller to replace.

    groups: the rollouts to train on, by group. advantages: one number a rollout, alike. Rollouts
    of a group that begin with the same prompt share it as one segment. Raises ValueError when no
    rollout has a sampled token.
    """
    segments: list[Segment] = []
    columns = _Columns()
    advantage_of: list[float] = []
    tokens = 0
    for rollouts, values in zip(groups, advantages, strict=True):
        if not rollouts:
            continue
        first = rollouts[0].turns[0].prompt
        root = len(segments)
        segments.append(Segment(tokens=first, parent=-1, start=0, adapter=adapter))
        root_start, tokens = tokens, tokens + len(first)
        for rollout, value in zip(rollouts, values, strict=True):
            number = len(advantage_of)
            advantage_of.append(float(value))
            for row in _rows(rollout):
                shared = len(first) if _starts_with(row.tokens, first) else 0
                inputs = row.tokens[shared:-1]  # the last token predicts nothing
                if len(inputs):
                    parent = root if shared else -1
                    segments.append(
                        Segment(tokens=inputs, parent=parent, start=shared, adapter=adapter)
                    )
                _add_items(columns, row, number, shared, root_start, tokens)
                tokens += len(inputs)
    if not columns.source:
        raise ValueError(f"adapter {adapter!r}: no rollout has a sampled token to train on")
    sequence = np.concatenate(columns.sequence)
    count = len(sequence)
    items = Items(
        source=np.concatenate(columns.source),
        target=np.concatenate(columns.target).astype(np.int64),
        weight=np.ones(count, dtype=np.float32),
        advantage=np.asarray(advantage_of, dtype=np.float32)[sequence],
        behaviour=np.concatenate(columns.behaviour).astype(np.float32),
        temperature=np.full(count, temperature, dtype=np.float32),
        sequence=sequence,
    )
    return Batch(segments=tuple(segments), items=items)


def concatenate(batches: Sequence[Batch]) -> Batch:
    """One batch of several, each of its own adapter; sequence numbers are made distinct."""
    parts: list[Piece] = []
    sequences = items = 0
    for batch in batches:
        own = batch.items.sequence
        columns = {f: getattr(batch.items, f) for f in Items.__slots__}
        moved = Items(**{**columns, "sequence": own + sequences})
        place = np.arange(items, items + len(own))
        parts.append(Piece(batch=Batch(segments=batch.segments, items=moved), items=place))
        sequences += int(own.max()) + 1
        items += len(own)
    return join(parts).batch


def _rows(rollout: Rollout) -> list[_Row]:
    rows: list[_Row] = []
    for turn in rollout.turns:
        sampled = turn.completion.tokens
        if len(sampled) == 0:
            continue
        # the newest first: conversations that go on side by side are rows of their own
        row = next((r for r in reversed(rows) if _starts_with(turn.prompt, r.tokens)), None)
        if row is None:
            rows.append(row := _Row(turn.prompt, [], []))
        row.tokens = np.concatenate([turn.prompt, sampled])
        row.predicted.append((len(turn.prompt), len(row.tokens)))
        row.behaviour.append(turn.completion.logprobs)
    return rows


def _starts_with(tokens: Ints, prefix: Ints) -> bool:
    return len(tokens) >= len(prefix) and np.array_equal(tokens[: len(prefix)], prefix)


def _add_items(
    columns: _Columns, row: _Row, number: int, shared: int, root_start: int, own_start: int
) -> None:
    for (start, stop), behaviour in zip(row.predicted, row.behaviour, strict=True):
        source = np.arange(start - 1, stop - 1, dtype=np.int64)
        moved = np.where(source < shared, source + root_start, source - shared + own_start)
        columns.source.append(moved)
        columns.target.append(row.tokens[start:stop])
        columns.behaviour.append(behaviour)
        columns.sequence.append(np.full(stop - start, number, dtype=np.int64))
