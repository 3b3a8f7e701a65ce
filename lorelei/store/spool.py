"""Finished groups not trained on yet, so that an asynchronous run loses none in a crash."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np

from lorelei.store.durable import StoreError, delete_file, make_folder, write_file
from lorelei.store.record import read_record, record_bytes
from lorelei.types import Completion, Group, Ints, Prompt, Rollout, Turn


class Spool:
    """One JSON record a group, in spool/<adapter>/<index>.json of the run folder."""

    def __init__(self, folder: Path) -> None:
        self.warnings: list[str] = []
        self._folder = folder / "spool"

    def put(self, group: Group) -> None:
        """Make a finished group durable."""
        path = self._path(group.adapter, group.index)
        make_folder(path.parent)
        write_file(path, record_bytes(_plain(asdict(group))))

    def read(self, adapter: str) -> dict[int, Group]:
        """The groups of an adapter, by rising index. A damaged one is deleted, with a warning."""
        groups: dict[int, Group] = {}
        for path in sorted((self._folder / adapter).glob("*.json")):
            try:
                groups[int(path.stem)] = _group(read_record(path))
            except StoreError as error:
                self.warnings.append(f"{error}; the group is sampled again")
                delete_file(path)
        return groups

    def remove(self, adapter: str, indices: Iterable[int]) -> None:
        """Forget groups; those that are not there count as forgotten."""
        for index in indices:
            path = self._path(adapter, index)
            if path.exists():
                delete_file(path)

    def _path(self, adapter: str, index: int) -> Path:
        return self._folder / adapter / f"{index:08d}.json"


def _plain(value: Any) -> Any:
    """Arrays as lists, at any depth."""
    if isinstance(value, np.ndarray):
        return cast(Any, value).tolist()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in cast(dict[str, Any], value).items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in cast(list[Any], value)]
    return value


def _group(raw: dict[str, Any]) -> Group:
    prompt: dict[str, Any] = {
        **raw["prompt"],
        "tokens": _ints(raw["prompt"]["tokens"]),
        "messages": tuple(raw["prompt"]["messages"]),
        "tools": tuple(raw["prompt"].get("tools", ())),  # none in what an earlier version left
    }
    return Group(
        adapter=raw["adapter"],
        index=raw["index"],
        prompt=Prompt(**prompt),
        rollouts=tuple(_rollout(rollout) for rollout in raw["rollouts"]),
    )


def _rollout(raw: dict[str, Any]) -> Rollout:
    fields: dict[str, Any] = {**raw, "turns": tuple(_turn(turn) for turn in raw["turns"])}
    return Rollout(**fields)


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


def _ints(values: list[int]) -> Ints:
    return np.asarray(values, dtype=np.int32)
