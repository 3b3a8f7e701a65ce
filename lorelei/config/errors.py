"""Configuration errors as one line: dotted field, value, what is allowed, the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:  # programs that only compute run where there is no pydantic
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails


_SHOWN = 20  # names in one error line, which a terminal should hold


class ConfigError(ValueError):
    """A configuration that cannot run; the message is the whole line for the user."""

    def __init__(self, message: str) -> None:
        # one line, whatever the keys and values that it quotes hold
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


class FieldError(ValueError):
    """A refused field, seen from within its section; `describe` adds where the section is."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


def unknown_key(key: str, known: Iterable[str]) -> str:
    """What to say of a key that is not in `known`, with the nearest one that is."""
    return f"unknown key; {nearest(key, known)}"


def nearest(word: str, known: Iterable[str]) -> str:
    """The likely correction of a misspelt word, else everything that is allowed."""
    choices = sorted(known)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    left = len(choices) - _SHOWN
    more = f" and {left} more, see `lorelei schema`" if left > 0 else ""
    return f"allowed: {', '.join(choices[:_SHOWN])}{more}"


def describe(error: ValidationError, data: object, prefix: str = "") -> str:
    """One line for the first thing wrong with `data`, which stands at `prefix` in the file."""
    first, *others = error.errors(include_url=False)
    others = [other for other in others if not _follows(other, first)]
    more = f" (and {len(others)} more)" if others else ""
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return f"{cause}{more}"
    where = [prefix] if prefix else []
    where += _path(first["loc"], data, missing=first["type"] == "missing")
    if isinstance(cause, FieldError):
        return f"{'.'.join([*where, cause.field])}: {cause.message}{more}"
    return f"{'.'.join(where) or 'the file'}: {_explain(first)}{more}"


def _follows(error: ErrorDetails, first: ErrorDetails) -> bool:
    """Whether an error only repeats `first`: about what contains it, or a default that needs it."""
    around = first["loc"][: len(error["loc"])] == error["loc"]
    return around or error["type"] == "default_factory_not_called"


def _path(loc: Sequence[int | str], data: object, *, missing: bool) -> list[str]:
    """The keys of `loc` as the user wrote them: pydantic adds the tag of a tagged union."""
    path: list[str] = []
    for number, part in enumerate(loc):
        at_missing_key = missing and number == len(loc) - 1
        if isinstance(data, Mapping):
            mapping = cast(Mapping[Any, object], data)
            if part not in mapping and not at_missing_key:
                continue
            data = mapping.get(part)
        elif isinstance(data, list | tuple) and isinstance(part, int):
            data = cast(Sequence[object], data)[part]
        elif not at_missing_key:
            continue
        path.append(str(part))
    return path


def _explain(error: ErrorDetails) -> str:
    value, context = error["input"], error.get("ctx", {})
    match error["type"]:
        case "missing":
            return "is required"
        case "literal_error":
            return f"{shown(value)} is not allowed; allowed: {context['expected']}"
        case "too_short":
            return f"{shown(value)} is not allowed; it needs at least {context['min_length']}"
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"{shown(value)} is not allowed; write a mapping, {{key: value, ...}}"
        case _:
            reason = error["msg"].removeprefix("Value error, ").replace("Input should", "it must")
            return f"{shown(value)} is not allowed; {reason}"


def shown(value: object) -> str:
    """A value for an error line, at most 80 characters of it."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
