"""OmegaConf's interpolations in plain values: ${actor.path}, ${.lr}, ${oc.env:HOME,/tmp}."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any, cast

from lorelei.config.errors import ConfigError, nearest
from lorelei.config.section import Raw, is_mapping

_INNERMOST = re.compile(r"(?<!\\)\$\{([^${}]*)\}")


Default = Callable[[str], tuple[bool, Any]]  # of a dotted key: whether there is one, and which


def resolve(data: Raw, default: Default = lambda _: (False, None)) -> Raw:
    """`data` with every reference replaced by what it names; a whole value keeps its type.

    default: what a key has that is not in `data`. Raises ConfigError for what is in neither, for a
    circle, and for resolvers but oc.env.
    """
    return cast(Raw, _Resolver(data, default).value(data, ()))


class _Resolver:
    def __init__(self, data: Raw, default: Default) -> None:
        self._data = data
        self._default = default
        self._open: list[tuple[str, ...]] = []  # what is being resolved

    def value(self, value: object, path: tuple[str, ...]) -> object:
        """path: where `value` stands."""
        if is_mapping(value):
            return {key: self.value(v, (*path, str(key))) for key, v in value.items()}
        if isinstance(value, list):
            items = cast(list[object], value)
            return [self.value(v, (*path, str(n))) for n, v in enumerate(items)]
        if not isinstance(value, str) or "${" not in value:
            return value
        if path in self._open:
            circle = " -> ".join(".".join(p) for p in (*self._open, path))
            raise ConfigError(f"{'.'.join(path)}: refers to itself ({circle}); write the value")
        self._open.append(path)
        found = self._text(value, path)
        self._open.pop()
        return found

    def _text(self, text: str, path: tuple[str, ...]) -> object:
        while (match := _INNERMOST.search(text)) is not None:
            found = self._reference(match[1].strip(), path)
            if match[0] == text:
                return found
            text = f"{text[: match.start()]}{found}{text[match.end() :]}"
        return text.replace("\\${", "${")

    def _reference(self, reference: str, path: tuple[str, ...]) -> object:
        where = ".".join(path)
        resolver, colon, arguments = reference.partition(":")
        if colon:
            return _environment(resolver, arguments, where)
        name = reference.lstrip(".")
        up = len(reference) - len(name)  # one dot: beside it
        above = path[: len(path) - up] if up else ()
        target = (*above, *re.split(r"[.\[\]]+", name.rstrip("]")))
        return self.value(self._at(target, f"{where}: ${{{reference}}}"), target)

    def _at(self, target: tuple[str, ...], where: str) -> object:
        found: Any = self._data
        for depth, key in enumerate(target):
            if is_mapping(found) and key in found:
                found = found[key]
            elif (
                isinstance(found, list) and key.isdigit() and int(key) < len(cast(list[Any], found))
            ):
                found = cast(list[Any], found)[int(key)]
            else:
                known, value = self._default(".".join(target))
                if known:
                    return value
                there = (
                    nearest(key, map(str, cast(Raw, found)))
                    if is_mapping(cast(object, found))
                    else "it has no keys"
                )
                raise ConfigError(
                    f"{where} names nothing: there is no {'.'.join(target[: depth + 1])}; {there}"
                )
        return found


def _environment(resolver: str, arguments: str, where: str) -> str:
    name, comma, default = (part.strip() for part in arguments.partition(","))
    if resolver != "oc.env":
        raise ConfigError(
            f"{where}: ${{{resolver}:...}} is no resolver that is known here; write the value"
        )
    if name not in os.environ and not comma:
        raise ConfigError(
            f"{where}: the environment variable {name} is not set; set it, or write "
            f"${{oc.env:{name},DEFAULT}}"
        )
    return os.environ.get(name, default)
