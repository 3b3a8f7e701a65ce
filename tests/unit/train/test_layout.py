"""Laying out batches: whatever is cut, packed, shared or flattened is still the same batch."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import pytest

from lorelei.model.attention import tree_blocks
from lorelei.train.layout import Piece, flatten, join, micro_batches, pieces, share
from lorelei.types import Batch, Items, Segment

CASES = range(60)
LIMITS = (1, 12, 40, 10_000)


def random_batch(seed: int) -> Batch:
    """A forest of up to three adapters whose sequences may have items in several branches."""
    rng = np.random.default_rng(seed)
    segments: list[Segment] = []
    for _ in range(int(rng.integers(1, 12))):
        parent = int(rng.integers(-1, len(segments))) if rng.random() < 0.8 else -1
        above = segments[parent] if parent >= 0 else None
        segments.append(
            Segment(
                tokens=rng.integers(0, 99, int(rng.integers(1, 9))).astype(np.int32),
                parent=parent,
                start=above.start + len(above.tokens) if above else 0,
                adapter=above.adapter if above else str(rng.choice(["a", "b", "c"])),
            )
        )
    total = sum(len(s.tokens) for s in segments)
    count = int(rng.integers(1, 20))
    source = rng.integers(0, total, count)
    columns = rng.normal(size=(4, count)).astype(np.float32)
    return Batch(
        segments=tuple(segments),
        items=Items(
            source=source,
            target=rng.integers(0, 99, count),
            weight=columns[0],
            temperature=columns[3],
            sequence=rng.integers(0, 6, count),
            streams={
                "advantage": columns[1],
                "behaviour": columns[2],
                **({"reference": columns[0]} if seed % 2 else {}),
            },
        ),
    )


def owner(batch: Batch, item: int) -> int:
    """The segment that holds an item's source."""
    ends = np.cumsum([len(s.tokens) for s in batch.segments])
    return next(i for i, end in enumerate(ends) if batch.items.source[item] < end)


def meaning(batch: Batch, item: int) -> tuple[object, ...]:
    """All that decides an item's prediction and loss: its context, from the root, and columns."""
    at = owner(batch, item)
    before = sum(len(s.tokens) for s in batch.segments[:at])
    within = int(batch.items.source[item]) - before
    segment = batch.segments[at]
    adapter, position = segment.adapter, segment.start + within
    context = segment.tokens[: within + 1].tolist()
    while segment.parent >= 0:
        segment = batch.segments[segment.parent]
        context = segment.tokens.tolist() + context
    items = batch.items
    fields = (items.target, items.weight, items.temperature, items.sequence)
    # NaN: the item has no such stream
    streams = {n: float(v[item]) for n, v in items.streams.items() if not np.isnan(v[item])}
    columns = [float(column[item]) for column in fields]
    return (adapter, position, tuple(context), *columns, *sorted(streams.items()))


def meanings(batch: Batch) -> list[tuple[object, ...]]:
    return [meaning(batch, i) for i in range(len(batch.items))]


def assert_same_items(batch: Batch, parts: Sequence[Piece]) -> None:
    """Every item is in exactly one part, in its context."""
    whole = meanings(batch)
    places = [int(i) for part in parts for i in part.items]
    assert sorted(places) == list(range(len(whole)))
    for part in parts:
        assert meanings(part.batch) == [whole[i] for i in part.items]


def assert_computable(batch: Batch) -> None:
    """Attention accepts the order of segments, and each adapter's tokens and items are one run."""
    tree_blocks([len(s.tokens) for s in batch.segments], [s.parent for s in batch.segments])
    owners = [batch.segments[owner(batch, i)].adapter for i in range(len(batch.items))]
    for names in (owners, [s.adapter for s in batch.segments]):
        runs = [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name]
        assert len(runs) == len(set(runs))


def assert_sequences_whole(batch: Batch, parts: Sequence[Piece]) -> None:
    where: dict[tuple[str, int], set[int]] = defaultdict(set)
    for number, part in enumerate(parts):
        for i in range(len(part.items)):
            name = part.batch.segments[owner(part.batch, i)].adapter
            where[name, int(part.batch.items.sequence[i])].add(number)
    assert all(len(numbers) == 1 for numbers in where.values())


@pytest.mark.parametrize("limit", LIMITS)
def test_pieces_hold_every_item_once_in_its_context_and_keep_sequences_whole(limit: int) -> None:
    for seed in CASES:
        batch = random_batch(seed)
        parts = pieces(batch, limit)
        assert_same_items(batch, parts)
        assert_sequences_whole(batch, parts)
        for part in parts:
            assert_computable(part.batch)
        names = [part.batch.segments[0].adapter for part in parts]
        assert names == sorted(names, key=batch.adapters.index)


@pytest.mark.parametrize("limit", LIMITS)
def test_micro_batches_hold_every_item_once_within_the_limit(limit: int) -> None:
    for seed in CASES:
        batch = random_batch(seed)
        parts = micro_batches(batch, limit)
        assert_same_items(batch, parts)
        assert_sequences_whole(batch, parts)
        largest = max(piece.tokens for piece in pieces(batch, limit))
        for part in parts:
            assert_computable(part.batch)
            assert part.tokens <= max(limit, largest)


def test_a_tree_that_is_too_large_is_split_between_branches_that_share_no_sequence() -> None:
    def segment(length: int, parent: int, start: int) -> Segment:
        tokens = np.arange(length, dtype=np.int32)
        return Segment(tokens=tokens, parent=parent, start=start, adapter="a")

    segments = (segment(10, -1, 0), *(segment(5, 0, 10) for _ in range(4)))
    # sequences 0 and 3 have their first item at the prompt's end; 3 has a second branch
    source = np.array([9, 10, 9, 15, 9, 20, 25, 9])
    sequence = np.array([0, 0, 1, 1, 3, 3, 3, 9])
    ones = np.ones(len(source), dtype=np.float32)
    items = Items(source=source, target=source, sequence=sequence, weight=ones, temperature=ones)
    batch = Batch(segments=segments, items=items)
    assert [p.tokens for p in pieces(batch, 30)] == [30]
    assert [p.tokens for p in pieces(batch, 20)] == [20, 20]
    assert [p.items.tolist() for p in pieces(batch, 20)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    # 15 tokens hold the prompt and one branch; the sequence of two branches stays whole
    assert [p.tokens for p in pieces(batch, 15)] == [15, 15, 20]


def test_segments_without_items_are_not_computed() -> None:
    batch = random_batch(3)
    lone = Segment(tokens=np.zeros(50, dtype=np.int32), parent=-1, start=0, adapter="a")
    more = Batch(segments=(*batch.segments, lone), items=batch.items)
    assert sum(p.tokens for p in pieces(more, 12)) == sum(p.tokens for p in pieces(batch, 12))


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_shares_of_ranks_hold_every_piece_once_and_are_balanced(ranks: int) -> None:
    for seed in CASES:
        parts = pieces(random_batch(seed), 12)
        shares = share(parts, ranks)
        assert len(shares) == ranks
        assert Counter(id(p) for mine in shares for p in mine) == Counter(map(id, parts))
        loads = [sum(p.tokens for p in mine) for mine in shares]
        # largest first onto the lightest: no two differ by more than one piece
        assert max(loads) - min(loads) <= max(p.tokens for p in parts)


def test_a_rank_can_cut_its_share_again() -> None:
    for seed in CASES:
        batch = random_batch(seed)
        again: list[Piece] = []
        for mine in share(pieces(batch, 12), 3):
            if mine:
                whole = join(mine)
                again += [
                    Piece(batch=p.batch, items=whole.items[p.items])
                    for p in micro_batches(whole.batch, 12)
                ]
        assert_same_items(batch, again)


def test_flattened_sequences_predict_the_same_items_in_the_same_order() -> None:
    for seed in CASES:
        batch = random_batch(seed)
        apart = flatten(batch)
        assert all(s.parent == -1 for s in apart.segments)
        assert meanings(apart) == meanings(batch)
        parents = {s.parent for s in batch.segments}
        assert len(apart.segments) == sum(i not in parents for i in range(len(batch.segments)))


def test_joined_parts_fill_a_stream_that_some_lack_with_nan() -> None:
    with_reference, without = random_batch(1), random_batch(2)
    parts = [
        Piece(batch=b, items=np.arange(len(b.items)) + k * 100)
        for k, b in enumerate((with_reference, without))
    ]
    joined = join(parts)
    count = len(with_reference.items)
    assert joined.batch.items.streams.keys() == {"advantage", "behaviour", "reference"}
    reference = joined.batch.items.streams["reference"]
    np.testing.assert_array_equal(reference[:count], with_reference.items.streams["reference"])
    assert np.isnan(reference[count:]).all()
    assert joined.items.tolist() == [*range(count), *range(100, 100 + len(without.items))]
    assert meanings(joined.batch)[count:] == meanings(without)
