"""What one key of an AReaL file becomes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

How = Literal["copied", "made", "equal", "only", "ignored", "own"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A key, or all keys below it that have no rule of their own."""

    key: str
    how: How
    ours: tuple[str, ...] = ()  # the keys it becomes
    why: str = ""  # how it becomes that, or why it becomes nothing
    default: Any = None  # AReaL's own, used where the file says nothing
    allowed: tuple[object, ...] = ()  # of `only`: what needs nothing here; another is refused
    equal_to: str = ""  # of `equal`: the key that must say the same
    convert: Callable[[Any], Any] | None = None  # of `copied`
    objective: str = ""  # of `only`: what another value would train, which is not built yet


def copied(
    key: str,
    ours: str,
    *,
    default: Any = None,
    why: str = "",
    convert: Callable[[Any], Any] | None = None,
) -> Rule:
    """The value as it is, or converted."""
    return Rule(key=key, how="copied", ours=(ours,), why=why, default=default, convert=convert)


def made(key: str, *ours: str, why: str, default: Any = None) -> Rule:
    """Values that follow from this one and others."""
    return Rule(key=key, how="made", ours=ours, why=why, default=default)


def equal(key: str, other: str, why: str) -> Rule:
    """Nothing, where it says what another key says; else a contradiction."""
    return Rule(key=key, how="equal", equal_to=other, why=why)


def only(key: str, *allowed: object, why: str = "", objective: str = "") -> Rule:
    """Nothing, for values that need nothing. objective: what another value means."""
    why = why or f"{objective} is not built yet"
    return Rule(key=key, how="only", allowed=allowed, why=why, objective=objective)


def ignored(key: str, why: str) -> Rule:
    """Nothing, whatever it says."""
    return Rule(key=key, how="ignored", why=why)


def own(key: str, needs: str) -> Rule:
    """Nothing: a key of an example's own class, and of ours, which one says it instead."""
    why = "a setting of the example's own class, for the Python code beside it"
    return Rule(key=f"{key}.*", how="own", ours=(needs,) if needs else (), why=why)
