"""The history of a run: its steps and evaluations, read from metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lorelei.obs.records import EvalRecord, StepRecord, eval_record, step_record


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """The committed steps and evaluations of a run, each once, in rising order."""

    steps: Mapping[str, tuple[StepRecord, ...]]  # by adapter
    evals: Mapping[str, tuple[EvalRecord, ...]]  # by adapter

    @property
    def adapters(self) -> tuple[str, ...]:
        """Adapters in order of first appearance."""
        return tuple(dict.fromkeys((*self.steps, *self.evals)))

    @property
    def score_names(self) -> tuple[str, ...]:
        """Names of held-out scores; 'strict' comes first."""
        names = dict.fromkeys(n for es in self.evals.values() for e in es for n in e.scores)
        return tuple(sorted(names, key=lambda name: name != "strict"))


def read_metrics(path: Path) -> History:
    """Read metrics.jsonl. A last line cut by a crash is left out; other kinds are skipped.

    A step written again after a resume replaces the earlier one and all that followed it.
    Raises ValueError for any other line that is not a record, naming file and line.
    """
    steps: dict[str, list[StepRecord]] = {}
    evals: dict[str, list[EvalRecord]] = {}
    for raw in _objects(path):
        if raw.get("kind") == "step":
            step = step_record(raw)
            mine = steps.setdefault(step.adapter, [])
            if mine and mine[-1].step >= step.step:
                # The evaluation of this very step may stand before it and be the new one.
                _drop_from(evals.get(step.adapter, []), step.step + 1)
            _drop_from(mine, step.step)
            mine.append(step)
        elif raw.get("kind") == "eval":
            score = eval_record(raw)
            _drop_from(evals.setdefault(score.adapter, []), score.step)
            evals[score.adapter].append(score)
    return History(
        steps={name: tuple(records) for name, records in steps.items()},
        evals={name: tuple(records) for name, records in evals.items()},
    )


def _drop_from(records: list[StepRecord] | list[EvalRecord], step: int) -> None:
    while records and records[-1].step >= step:
        records.pop()


def _objects(path: Path) -> list[Mapping[str, Any]]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; name the folder of a run that has started")
    lines = path.read_bytes().split(b"\n")
    objects: list[Mapping[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:  # UnicodeDecodeError is one too
            if number == len(lines):  # no newline behind it: the write was cut
                break
            raise ValueError(f"{path}:{number}: not JSON ({error}); delete this line") from error
        if not isinstance(value, dict):
            raise ValueError(f"{path}:{number}: {line[:40]!r} is not a JSON object; delete it")
        objects.append(cast(Mapping[str, Any], value))
    return objects
