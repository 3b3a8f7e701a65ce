"""How a batch of segments is laid out: trees, micro-batches, shares of ranks, plain sequences.

Numpy only. Shapes: I items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lorelei.types import Batch, Floats, Items, Longs, Segment


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of a batch that stands on its own, and where its items stand in the batch."""

    batch: Batch
    items: Longs

    @property
    def tokens(self) -> int:
        return sum(len(s.tokens) for s in self.batch.segments)


def starts(segments: Sequence[Segment]) -> Longs:
    """[S + 1] where each segment starts in the concatenation of all, and its length."""
    return np.concatenate([[0], np.cumsum([len(s.tokens) for s in segments])]).astype(np.int64)


def token_columns(segments: Sequence[Segment]) -> tuple[Longs, Longs]:
    """Token ids and their positions in their sequences, [T] each."""
    tokens_T = np.concatenate([s.tokens for s in segments]).astype(np.int64)
    positions_T = np.concatenate([np.arange(s.start, s.start + len(s.tokens)) for s in segments])
    return tokens_T, positions_T


def take_items(items: Items, index: Longs, source: Longs) -> Items:
    """The items at `index`, with new sources."""
    return Items(
        source=source,
        target=items.target[index],
        weight=items.weight[index],
        temperature=items.temperature[index],
        sequence=items.sequence[index],
        streams={name: values[index] for name, values in items.streams.items()},
    )


def pieces(batch: Batch, max_tokens: int) -> list[Piece]:
    """Trees of the batch, each of at most `max_tokens` where it can be split, sorted by adapter.

    A tree that is too large is split between the children of its root, which every part repeats.
    All items of one sequence stay in one piece, even where its rows stand in several trees.
    """
    bounds = starts(batch.segments)
    lengths = np.diff(bounds)
    owner = np.searchsorted(bounds, batch.items.source, side="right") - 1
    bundles = _bundles(batch, lengths, owner, max_tokens)
    adapters = {name: i for i, name in enumerate(batch.adapters)}
    parts: list[_Part] = []
    for part in sorted(bundles, key=lambda p: (adapters[batch.segments[p.first].adapter], p.first)):
        if parts and parts[-1].segments & part.segments:  # the same root: read it once if it fits
            added = sum(lengths[i] for i in part.segments - parts[-1].segments)
            if added == 0 or added + sum(lengths[i] for i in parts[-1].segments) <= max_tokens:
                parts[-1].segments.update(part.segments)
                parts[-1].items.extend(part.items)
                continue
        parts.append(part)
    return [_piece(batch, bounds, owner, part) for part in parts]


def micro_batches(batch: Batch, max_tokens: int) -> list[Piece]:
    """Pieces packed in order into batches of at most `max_tokens` (or one piece)."""
    packed: list[list[Piece]] = []
    room = 0
    for piece in pieces(batch, max_tokens):
        if piece.tokens > room:
            packed.append([])
            room = max_tokens
        packed[-1].append(piece)
        room -= piece.tokens
    return [join(group) for group in packed]


def packed(parts: list[Piece], max_tokens: int) -> list[Piece]:
    """Micro-batches of a rank's share, their items those of the whole batch."""
    if not parts:
        return []
    joined = join(parts)
    local = micro_batches(joined.batch, max_tokens)
    return [Piece(batch=p.batch, items=joined.items[p.items]) for p in local]


def join(parts: Sequence[Piece]) -> Piece:
    """One piece of several of the same batch."""
    segments: list[Segment] = []
    sources: list[Longs] = []
    tokens = 0
    for part in parts:
        offset = len(segments)
        segments += [
            replace(s, parent=s.parent + offset if s.parent >= 0 else -1)
            for s in part.batch.segments
        ]
        sources.append(part.batch.items.source + tokens)
        tokens += part.tokens
    held = [p.batch.items for p in parts]
    items = Items(
        source=np.concatenate(sources),
        target=np.concatenate([i.target for i in held]),
        weight=np.concatenate([i.weight for i in held]),
        temperature=np.concatenate([i.temperature for i in held]),
        sequence=np.concatenate([i.sequence for i in held]),
        streams=_joined_streams(held),
    )
    return Piece(
        batch=Batch(segments=tuple(segments), items=items),
        items=np.concatenate([p.items for p in parts]),
    )


def padding_piece(batch: Batch) -> Piece:
    """A padding piece of one token and no items, which keeps ranks in lockstep."""
    first = batch.segments[0]
    segment = replace(first, tokens=first.tokens[:1], parent=-1)
    nothing = np.arange(0)
    items = take_items(batch.items, nothing, batch.items.source[:0])
    return Piece(batch=Batch(segments=(segment,), items=items), items=nothing)


def share(parts: Sequence[Piece], ranks: int) -> list[list[Piece]]:
    """Pieces for each rank, balanced by tokens (largest first onto the lightest rank)."""
    loads = [0] * ranks
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for i in sorted(range(len(parts)), key=lambda i: (-parts[i].tokens, i)):
        lightest = loads.index(min(loads))
        shares[lightest].append(i)
        loads[lightest] += parts[i].tokens
    return [[parts[i] for i in sorted(mine)] for mine in shares]


def flatten(batch: Batch) -> Batch:
    """The same batch as plain sequences, for engines that cannot share prefixes.

    Items keep their order; one whose source many sequences share is predicted from the first.
    """
    parents = {s.parent for s in batch.segments}
    bounds = starts(batch.segments)
    rows: list[Segment] = []
    shift: dict[int, int] = {}  # segment -> where its first token stands in its first row
    total = 0
    for leaf in (i for i in range(len(batch.segments)) if i not in parents):
        path = [leaf]
        while (parent := batch.segments[path[0]].parent) >= 0:
            path.insert(0, parent)
        offset = total
        for i in path:
            shift.setdefault(i, offset)
            offset += len(batch.segments[i].tokens)
        tokens = np.concatenate([batch.segments[i].tokens for i in path])
        first = batch.segments[path[0]]
        rows.append(Segment(tokens=tokens, parent=-1, start=first.start, adapter=first.adapter))
        total = offset
    owner = np.searchsorted(bounds, batch.items.source, side="right") - 1
    moved = np.array([shift[int(i)] for i in owner], dtype=np.int64) - bounds[owner]
    everything = np.arange(len(batch.items))
    items = take_items(batch.items, everything, batch.items.source + moved)
    return Batch(segments=tuple(rows), items=items)


def _joined_streams(parts: Sequence[Items]) -> dict[str, Floats]:
    """The streams of all parts; NaN for the items of a part that lacks one."""
    names = dict.fromkeys(name for items in parts for name in items.streams)
    return {
        name: np.concatenate(
            [i.streams.get(name, np.full(len(i), np.nan, dtype=np.float32)) for i in parts]
        )
        for name in names
    }


@dataclass(frozen=True, slots=True)
class _Part:
    """Segments, with all their ancestors, and the items to predict from them."""

    segments: set[int]
    items: list[int]

    @property
    def first(self) -> int:
        return min(self.segments)


def _bundles(batch: Batch, lengths: Longs, owner: Longs, max_tokens: int) -> list[_Part]:
    """The smallest parts that keep each item's ancestors and each sequence together."""
    unit = _units(batch.segments, lengths, max_tokens)
    roots = _roots(batch.segments)
    home = _homes(batch, unit, roots, owner)
    same = list(range(len(unit)))  # union-find over units

    def find(i: int) -> int:
        while same[i] != i:
            same[i] = i = same[same[i]]
        return i

    first_of: dict[tuple[int, str], int] = {}
    for sequence, i in zip(batch.items.sequence.tolist(), home, strict=True):
        other = first_of.setdefault((sequence, batch.segments[i].adapter), i)
        same[find(i)] = find(other)
    found: dict[int, _Part] = {}
    for item, i in enumerate(home):
        found.setdefault(find(i), _Part(set(), [])).items.append(item)
    for i in range(len(unit)):
        if (part := found.get(find(unit[i]))) is not None:
            part.segments.update((i, roots[i]))
    return list(found.values())


def _units(segments: Sequence[Segment], lengths: Longs, max_tokens: int) -> list[int]:
    """What is never split, by the first segment: a tree that fits, else each branch of its root."""
    roots = _roots(segments)
    size = np.bincount(roots, weights=lengths, minlength=len(roots))
    unit: list[int] = []
    for i, segment in enumerate(segments):
        fits = size[roots[i]] <= max_tokens
        starts_unit = segment.parent < 0 or (segment.parent == roots[i] and not fits)
        unit.append(i if starts_unit else unit[segment.parent])
    return unit


def _homes(batch: Batch, unit: list[int], roots: list[int], owner: Longs) -> list[int]:
    """The unit of each item; one at the root of a split tree goes to its sequence's branch."""
    sequences: list[int] = batch.items.sequence.tolist()
    pairs = [(int(i), s) for i, s in zip(owner, sequences, strict=True)]
    branch: dict[tuple[int, int], int] = {}  # (root, sequence) -> its first branch
    for i, sequence in pairs:
        if unit[i] != roots[i]:
            branch.setdefault((roots[i], sequence), unit[i])
    return [branch.get((i, sequence), unit[i]) for i, sequence in pairs]


def _roots(segments: Sequence[Segment]) -> list[int]:
    roots: list[int] = []
    for i, segment in enumerate(segments):
        roots.append(i if segment.parent < 0 else roots[segment.parent])
    return roots


def _piece(batch: Batch, bounds: Longs, owner: Longs, part: _Part) -> Piece:
    order = _depth_first(batch.segments, part.segments)
    chosen = np.array(sorted(part.items), dtype=np.int64)
    place = {old: new for new, old in enumerate(order)}
    segments = tuple(
        replace(batch.segments[i], parent=place.get(batch.segments[i].parent, -1)) for i in order
    )
    inner = starts(segments)
    where = owner[chosen]
    shift = np.array([inner[place[int(i)]] for i in where], dtype=np.int64) - bounds[where]
    source = batch.items.source[chosen] + shift
    return Piece(
        batch=Batch(segments=segments, items=take_items(batch.items, chosen, source)),
        items=chosen,
    )


def _depth_first(segments: Sequence[Segment], members: set[int]) -> list[int]:
    """The members, each directly before its descendants, as attention wants them."""
    children: dict[int, list[int]] = {}
    for i in sorted(members):
        children.setdefault(segments[i].parent, []).append(i)
    order: list[int] = []
    waiting = children.get(-1, [])[::-1]
    while waiting:
        order.append(waiting.pop())
        waiting += children.get(order[-1], [])[::-1]
    return order
