"""The keys of an AReaL file and the rules they fall under."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from typing import Any

from lorelei.areal.rule import Rule
from lorelei.areal.rules import REPEATED, RULES
from lorelei.config.errors import ConfigError, nearest
from lorelei.config.section import Raw, is_mapping

BELOW = ".*"  # at the end of a rule's key: for all keys there that have none of their own
_BY_KEY = {rule.key: rule for rule in RULES}
# one is enough: ours have none of them
_MARKS = ("actor", "gconfig", "allocation_mode", "experiment_name", "train_dataset")


def is_areal(data: Raw) -> bool:
    """Whether a file has AReaL's shape."""
    return sum(mark in data for mark in _MARKS) > 1


def is_areal_key(key: str) -> bool:
    """Whether a dotted key means something in AReaL's files."""
    return rule_of(key) is not None or key.partition(".")[0] in _MARKS


def rule_of(key: str) -> Rule | None:
    """The rule of a dotted key: its own, else that of the innermost section that has one."""
    if key in _BY_KEY:
        return _BY_KEY[key]
    above, _, leaf = key.rpartition(".")
    if leaf in REPEATED and above:
        return REPEATED[leaf]
    parts = key.split(".")
    sections = (".".join(parts[:depth]) for depth in range(len(parts), 0, -1))
    found = (_BY_KEY.get(section + BELOW) for section in sections)
    return next((rule for rule in found if rule is not None), None)


def became(key: str, ours: Iterable[str]) -> list[str]:
    """Those of our dotted keys that a dotted key of AReaL's has become, or a part of."""
    rule = rule_of(key)
    targets = rule.ours if rule is not None else ()
    return [o for o in ours if any(fnmatch(o, t) or fnmatch(o, t + BELOW) for t in targets)]


class ArealFile:
    """A file without interpolations, by dotted key."""

    def __init__(self, data: Raw) -> None:
        """Raises ConfigError for a key without a rule."""
        self.values = dict(leaves(data))
        for key, value in self.values.items():
            if rule_of(key) is None and not (value is None and _is_section(key)):
                raise ConfigError(f"{key}: unknown key; {_fix(key)}")

    def has(self, key: str) -> bool:
        """Whether the file gives it a value."""
        return self.values.get(key) is not None

    def has_section(self, key: str) -> bool:
        """Whether the file gives anything below it."""
        return any(name.startswith(f"{key}.") for name in self.values)

    def value(self, key: str, default: Any = None) -> Any:
        """What the file says, else the default."""
        found = self.values.get(key)
        return default if found is None else found

    def number(self, key: str, default: Any = None) -> Any:
        """`value`, which must be a number. Raises ConfigError."""
        found = self.value(key, default)
        if found is not None and (isinstance(found, bool) or not isinstance(found, int | float)):
            raise ConfigError(f"{key}: {found!r} is not allowed; write a number")
        return found

    def section(self, key: str) -> Raw:
        """The values directly below a section."""
        prefix = f"{key}."
        return {k[len(prefix) :]: v for k, v in self.values.items() if k.startswith(prefix)}


def leaves(data: Raw, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys of nested mappings, and their values."""
    for key, value in data.items():
        name = f"{prefix}{key}"
        if is_mapping(value) and value:
            yield from leaves(value, f"{name}.")
        else:
            yield name, value


def _is_section(key: str) -> bool:
    """Whether rules stand below it: a section of null says nothing."""
    return any(name.startswith(f"{key}.") for name in _BY_KEY)


def _fix(key: str) -> str:
    section, _, leaf = key.rpartition(".")
    prefix = f"{section}." if section else ""
    depth = key.count(".")
    known = {
        name.removesuffix(BELOW).split(".")[depth]
        for name in _BY_KEY
        if name.startswith(prefix) and len(name.removesuffix(BELOW).split(".")) > depth
    }
    return nearest(leaf, known)
