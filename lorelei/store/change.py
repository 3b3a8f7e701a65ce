"""What was changed of a run on purpose, as run.json lists it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Of a field of the configuration, or of the input that it names."""

    field: str
    before: Any  # plain JSON, as after
    after: Any
    command: str  # that was told to
    created: str  # ISO 8601, UTC


def change(field: str, before: object, after: object, command: str) -> Change:
    """A change that is made now."""
    return Change(field=field, before=before, after=after, command=command, created=now())


def now() -> str:
    """ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
