"""How a batch of segments is laid out: trees, micro-batches, shares of ranks, plain sequences.

Numpy only. Shapes: I items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from lorelei.types import Batch, Items, Longs, Segment


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


def take_items(items: Items, index: Longs, source: Longs) -> Items:
    """The items at `index`, with new sources."""
    changed = {
        f.name: value[index] for f in fields(items) if (value := getattr(items, f.name)) is not None
    }
    return Items(**{**changed, "source": source})


def pieces(batch: Batch, max_tokens: int) -> list[Piece]:
    """Trees of the batch, each of at most `max_tokens` where it can be split, sorted by adapter.

    A tree that is too large is split between the children of its root, which every part repeats.
    All items of one sequence stay in one piece.
    """
    bounds = starts(batch.segments)
    roots = _roots(batch.segments)
    owner = np.searchsorted(bounds, batch.items.source, side="right") - 1
    adapters = {name: i for i, name in enumerate(batch.adapters)}
    found: list[Piece] = []
    for root in sorted(set(roots), key=lambda r: (adapters[batch.segments[r].adapter], r)):
        members = [i for i, r in enumerate(roots) if r == root]
        items = np.flatnonzero(np.isin(owner, members))
        for part in _parts(batch, members, max_tokens):
            chosen = _items_of_part(batch, items, owner, part, len(part) == len(members), root)
            if len(chosen):
                found.append(_piece(batch, bounds, owner, part, chosen))
    return found


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
    columns = {f.name: _column(parts, f.name) for f in fields(Items)}
    items = Items(**{**columns, "source": np.concatenate(sources)})
    return Piece(
        batch=Batch(segments=tuple(segments), items=items),
        items=np.concatenate([p.items for p in parts]),
    )


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


def _column(parts: Sequence[Piece], name: str) -> np.ndarray | None:
    """An item column of all parts; NaN where only some of them have an optional one."""
    held = [getattr(p.batch.items, name) for p in parts]
    if all(values is None for values in held):
        return None
    lengths = [len(p.batch.items) for p in parts]
    filled = [
        np.full(n, np.nan, dtype=np.float32) if values is None else values
        for values, n in zip(held, lengths, strict=True)
    ]
    return np.concatenate(filled)


def _roots(segments: Sequence[Segment]) -> list[int]:
    roots: list[int] = []
    for i, segment in enumerate(segments):
        roots.append(i if segment.parent < 0 else roots[segment.parent])
    return roots


def _parts(batch: Batch, members: list[int], max_tokens: int) -> list[list[int]]:
    """Members of a tree in depth-first order, split between the root's children if too large."""
    children: dict[int, list[int]] = {i: [] for i in members}
    for i in members[1:]:
        children[batch.segments[i].parent].append(i)

    def below(node: int) -> list[int]:
        return [node, *(d for child in children[node] for d in below(child))]

    def size(nodes: list[int]) -> int:
        return sum(len(batch.segments[i].tokens) for i in nodes)

    root = members[0]
    if size(members) <= max_tokens:
        return [below(root)]
    room = 0
    split: list[list[int]] = []
    for child in children[root]:
        subtree = below(child)
        if size(subtree) > room or not split:
            split.append([root])
            room = max_tokens - size([root])
        split[-1] += subtree
        room -= size(subtree)
    return split or [[root]]


def _items_of_part(
    batch: Batch, items: Longs, owner: Longs, part: list[int], whole: bool, root: int
) -> Longs:
    """Items of a part; those of the shared root go with the rest of their sequence."""
    if whole:
        return items
    inner = items[np.isin(owner[items], part[1:])]
    at_root = items[owner[items] == root]
    sequence = batch.items.sequence
    beyond_root = items[owner[items] != root]
    homeless = ~np.isin(sequence[at_root], sequence[beyond_root])
    first_part = bool(part[1:]) and part[1] == root + 1
    mine = np.isin(sequence[at_root], sequence[inner]) | (homeless & first_part)
    return np.sort(np.concatenate([inner, at_root[mine]]))


def _piece(batch: Batch, bounds: Longs, owner: Longs, part: list[int], chosen: Longs) -> Piece:
    place = {old: new for new, old in enumerate(part)}
    segments = tuple(
        replace(batch.segments[i], parent=place.get(batch.segments[i].parent, -1)) for i in part
    )
    inner = starts(segments)
    where = owner[chosen]
    shift = np.array([inner[place[int(i)]] for i in where], dtype=np.int64) - bounds[where]
    source = batch.items.source[chosen] + shift
    return Piece(
        batch=Batch(segments=segments, items=take_items(batch.items, chosen, source)),
        items=chosen,
    )
