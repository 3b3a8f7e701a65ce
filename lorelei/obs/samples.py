"""Samples of a run: rollouts written out for a person to read."""

from __future__ import annotations

import json
import random
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from lorelei.obs.screen import escaped

Order = Literal["worst", "best", "random"]
Record = Mapping[str, Any]
_WIDTH = 96


def format_samples(
    records: Iterable[Record],
    n: int,
    *,
    adapter: str | None = None,
    order: Order = "random",
    seed: int = 0,
) -> str:
    """The `n` worst, best or random rollouts of rollouts.jsonl, as text for a terminal.

    Among equal rewards the newest step comes first; rollouts without a reward come last.
    What the model wrote cannot act on the terminal: see `escaped`.
    Raises ValueError when there is none of this adapter, naming the adapters there are.
    """
    every = list(records)
    mine = [r for r in every if adapter is None or r.get("adapter") == adapter]
    if not mine:
        there = ", ".join(sorted({str(r.get("adapter")) for r in every})) or "no rollouts yet"
        raise ValueError(f"adapter: no rollout of {adapter!r}; recorded are: {there}")
    return "\n".join(_one(r) for r in _pick(mine, n, order, seed))


def _pick(records: Sequence[Record], n: int, order: Order, seed: int) -> Sequence[Record]:
    if order == "random":
        return random.Random(seed).sample(records, min(n, len(records)))
    sign = 1.0 if order == "worst" else -1.0

    def rank(record: Record) -> tuple[bool, float, int]:
        reward = record.get("reward")
        return reward is None, sign * float(reward or 0.0), -int(record.get("step") or 0)

    return sorted(records, key=rank)[:n]


def _one(record: Record) -> str:
    reward = record.get("reward")
    head = [
        "reward -" if reward is None else f"reward {reward:.3g}",
        f"step {record.get('step', '?')}",
        f"{record.get('adapter', '?')}@v{record.get('version', '?')}",
        f"prompt {record.get('prompt_id', '?')}",
        f"sample {record.get('sample', '?')}",
        str(record.get("finish_reason") or "-"),
        *([f"dropped: {record['dropped']}"] if record.get("dropped") else []),
    ]
    title = f"── {escaped(' · '.join(head))} "
    lines = [title.ljust(_WIDTH, "─")]
    if record.get("error"):
        lines.append(f"error       {escaped(str(record['error']))}")
    if record.get("metrics"):
        values = "  ".join(f"{name} {value:.3g}" for name, value in record["metrics"].items())
        lines.append(f"metrics     {escaped(values)}")
    lines += _block("prompt", record.get("prompt"))
    lines += _block("completion", record.get("completion"))
    return "\n".join(lines) + "\n"


def _block(label: str, value: Any) -> list[str]:
    """The text under its label, wrapped, behind a bar that separates the text from the labels."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    shown = escaped(text.expandtabs(4), keep="\n")
    wrapped = [
        piece
        for line in shown.split("\n")
        for piece in textwrap.wrap(line, _WIDTH - 14, drop_whitespace=False) or [""]
    ]
    return [f"{label if i == 0 else '':<12}│ {line}" for i, line in enumerate(wrapped)]
