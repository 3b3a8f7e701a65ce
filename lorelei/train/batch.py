"""From groups of rollouts, examples or comparisons to a batch of segments and items. Numpy only.

Shapes: P prompt tokens, T completion tokens, I items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lorelei.algo.loss import item_weights
from lorelei.train.layout import Piece, join
from lorelei.types import Batch, Comparison, Example, Floats, Ints, Items, Rollout, Segment


@dataclass(slots=True)
class _Row:
    """One token row of a rollout; a turn that continues an earlier row extends it."""

    tokens: Ints
    # [start, stop) of each completion in the row, and where its tokens stand among the rollout's
    predicted: list[tuple[int, int, int]]


@dataclass(slots=True)
class _Columns:
    source: list[np.ndarray] = field(default_factory=list[np.ndarray])
    target: list[np.ndarray] = field(default_factory=list[np.ndarray])
    sequence: list[np.ndarray] = field(default_factory=list[np.ndarray])
    streams: dict[str, list[np.ndarray]] = field(default_factory=dict[str, list[np.ndarray]])


def rollout_batch(
    adapter: str,
    groups: Sequence[Sequence[Rollout]],
    streams: Mapping[str, Sequence[Sequence[Floats]]],
    temperature: float,
) -> Batch:
    """The batch of one adapter's groups; weights are left at 1 for the caller to replace.

    groups: the rollouts to train on, by group. streams: by name, group and rollout, a number [T]
    for each sampled token in the order of its turns; 'behaviour' comes of the rollouts themselves.
    Rollouts of a group that begin with the same prompt share it as one segment. Raises ValueError
    when no rollout has a sampled token.
    """
    segments: list[Segment] = []
    columns = _Columns()
    tokens = number = 0
    for place, rollouts in enumerate(groups):
        if not rollouts:
            continue
        first = rollouts[0].turns[0].prompt
        root = len(segments)
        segments.append(Segment(tokens=first, parent=-1, start=0, adapter=adapter))
        root_start, tokens = tokens, tokens + len(first)
        for rollout_place, rollout in enumerate(rollouts):
            own = {name: by_group[place][rollout_place] for name, by_group in streams.items()}
            own["behaviour"] = np.concatenate([t.completion.logprobs for t in rollout.turns])
            for row in _rows(rollout):
                shared = len(first) if _starts_with(row.tokens, first) else 0
                inputs = row.tokens[shared:-1]  # the last token predicts nothing
                if len(inputs):
                    parent = root if shared else -1
                    segments.append(
                        Segment(tokens=inputs, parent=parent, start=shared, adapter=adapter)
                    )
                moves = (shared, root_start, tokens)
                _add_items(columns, row, number, own, moves)
                tokens += len(inputs)
            number += 1
    if not columns.source:
        raise ValueError(f"adapter {adapter!r}: no rollout has a sampled token to train on")
    return Batch(segments=tuple(segments), items=_items(columns, temperature))


def example_batch(adapter: str, examples: Sequence[Example]) -> Batch:
    """The batch of sequences that are given, each a segment of its own.

    An item weighs what its example does, divided by the number of all items. Raises ValueError when
    no token is to be predicted.
    """
    segments: list[Segment] = []
    columns = _Columns()
    tokens = 0
    for number, example in enumerate(examples):
        inputs = example.tokens[:-1]
        predicted = np.flatnonzero(example.predicted[1:])
        segments.append(Segment(tokens=inputs, parent=-1, start=0, adapter=adapter))
        columns.source.append(predicted + tokens)
        columns.target.append(example.tokens[1:][predicted])
        columns.sequence.append(np.full(len(predicted), number, dtype=np.int64))
        tokens += len(inputs)
    items = _items(columns, temperature=1.0)
    if not len(items):
        raise ValueError(f"adapter {adapter!r}: the examples have no token to predict")
    weights = np.array([example.weight for example in examples])[items.sequence]
    weight = (weights / len(items)).astype(np.float32)
    return Batch(segments=tuple(segments), items=replace(items, weight=weight))


def comparison_batch(adapter: str, comparisons: Sequence[Comparison]) -> Batch:
    """The batch of answers that are compared; every comparison weighs the same.

    The answers of one share its prompt as a segment, and its sequence number: no micro-batch parts
    them. The stream `answer` holds their signs.
    """
    segments: list[Segment] = []
    columns = _Columns()
    tokens = 0
    for number, one in enumerate(comparisons):
        root, root_start, shared = len(segments), tokens, len(one.prompt)
        segments.append(Segment(tokens=one.prompt, parent=-1, start=0, adapter=adapter))
        tokens += shared
        for answer, sign in zip(one.answers, one.signs, strict=True):
            whole = np.concatenate([one.prompt, answer])
            row = _Row(whole, [(shared, len(whole), 0)])
            signs = np.full(len(answer), sign, dtype=np.float32)
            _add_items(columns, row, number, {"answer": signs}, (shared, root_start, tokens))
            if len(inputs := answer[:-1]):
                segments.append(Segment(tokens=inputs, parent=root, start=shared, adapter=adapter))
                tokens += len(inputs)
    items = _items(columns, temperature=1.0)
    items = replace(items, weight=item_weights(items.sequence, "sequence"))
    return Batch(segments=tuple(segments), items=items)


def _items(columns: _Columns, temperature: float) -> Items:
    count = sum(map(len, columns.source))
    return Items(
        source=np.concatenate(columns.source),
        target=np.concatenate(columns.target).astype(np.int64),
        weight=np.ones(count, dtype=np.float32),
        temperature=np.full(count, temperature, dtype=np.float32),
        sequence=np.concatenate(columns.sequence),
        streams={
            name: np.concatenate(values).astype(np.float32)
            for name, values in columns.streams.items()
        },
    )


def concatenate(batches: Sequence[Batch]) -> Batch:
    """One batch of several, each of its own adapter; sequence numbers are made distinct."""
    parts: list[Piece] = []
    sequences = items = 0
    for batch in batches:
        own = batch.items.sequence
        moved = replace(batch.items, sequence=own + sequences)
        place = np.arange(items, items + len(own))
        parts.append(Piece(batch=Batch(segments=batch.segments, items=moved), items=place))
        sequences += int(own.max()) + 1
        items += len(own)
    return join(parts).batch


def _rows(rollout: Rollout) -> list[_Row]:
    rows: list[_Row] = []
    tokens = 0
    for turn in rollout.turns:
        sampled = turn.completion.tokens
        if len(sampled) == 0:
            continue
        # the newest first: conversations that go on side by side are rows of their own
        row = next((r for r in reversed(rows) if _starts_with(turn.prompt, r.tokens)), None)
        if row is None:
            rows.append(row := _Row(turn.prompt, []))
        row.tokens = np.concatenate([turn.prompt, sampled])
        row.predicted.append((len(turn.prompt), len(row.tokens), tokens))
        tokens += len(sampled)
    return rows


def _starts_with(tokens: Ints, prefix: Ints) -> bool:
    return len(tokens) >= len(prefix) and np.array_equal(tokens[: len(prefix)], prefix)


def _add_items(
    columns: _Columns,
    row: _Row,
    number: int,
    streams: Mapping[str, Floats],
    moves: tuple[int, int, int],
) -> None:
    """moves: the row's tokens before `shared` stand at root_start, the others at own_start."""
    shared, root_start, own_start = moves
    for start, stop, first in row.predicted:
        source = np.arange(start - 1, stop - 1, dtype=np.int64)
        moved = np.where(source < shared, source + root_start, source - shared + own_start)
        columns.source.append(moved)
        columns.target.append(row.tokens[start:stop])
        columns.sequence.append(np.full(stop - start, number, dtype=np.int64))
        for name, values in streams.items():
            columns.streams.setdefault(name, []).append(values[first : first + stop - start])
