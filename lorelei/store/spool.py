"""Finished groups that are not trained on yet, so that an asynchronous run loses none in a crash."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lorelei.store.durable import delete_file, make_folder, write_file
from lorelei.types import Completion, Group, Prompt, Rollout, Turn


class Spool:
    """One JSON file a group, in spool/<adapter>/<index>.json of the run folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "spool"

    def put(self, group: Group) -> None:
        """Make a finished group durable."""
        path = self._path(group.adapter, group.index)
        make_folder(path.parent)
        write_file(path, json.dumps(asdict(group), default=_plain).encode())

    def read(self, adapter: str) -> dict[int, Group]:
        """The groups of an adapter, by index."""
        paths = sorted((self._folder / adapter).glob("*.json"))
        return {group.index: group for group in (_group(json.loads(p.read_text())) for p in paths)}

    def remove(self, adapter: str, indices: Iterable[int]) -> None:
        """Forget groups; those that are not there count as forgotten."""
        for index in indices:
            path = self._path(adapter, index)
            if path.exists():
                delete_file(path)

    def _path(self, adapter: str, index: int) -> Path:
        return self._folder / adapter / f"{index:08d}.json"


def _plain(value: object) -> object:
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"a group holds a {type(value).__name__}, which JSON cannot")


def _group(raw: dict[str, Any]) -> Group:
    prompt = {**raw["prompt"], "tokens": _ints(raw["prompt"]["tokens"])}
    return Group(
        adapter=raw["adapter"],
        index=raw["index"],
        prompt=Prompt(**{**prompt, "messages": tuple(prompt["messages"])}),
        rollouts=tuple(
            Rollout(**{**r, "turns": tuple(_turn(t) for t in r["turns"])}) for r in raw["rollouts"]
        ),
    )


def _turn(raw: dict[str, Any]) -> Turn:
    held = raw["completion"]
    completion = Completion(
        tokens=_ints(held["tokens"]),
        # float32 -> JSON -> float32 is exact: repr keeps every bit of the wider float64
        logprobs=np.asarray(held["logprobs"], dtype=np.float32),
        versions=tuple((v, n) for v, n in held["versions"]),
        finish_reason=held["finish_reason"],
    )
    return Turn(prompt=_ints(raw["prompt"]), completion=completion, text=raw["text"])


def _ints(values: list[int]) -> np.ndarray:
    return np.asarray(values, dtype=np.int32)
