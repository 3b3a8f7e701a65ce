"""The keys of an AReaL file and the rules they fall under."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from fnmatch import fnmatch
from typing import Any

from lorelei.areal.rule import Rule
from lorelei.areal.rules import RULES
from lorelei.areal.service_rules import REPEATED
from lorelei.config.errors import ConfigError, nearest
from lorelei.config.section import Raw, is_mapping

BELOW = ".*"  # at the end of a rule's key: for all keys there that have none of their own
_BY_KEY = {rule.key: rule for rule in RULES}
_SECTIONS = {key.partition(".")[0] for key in _BY_KEY}
# one is enough: ours have none of them
_MARKS = ("actor", "gconfig", "allocation_mode", "experiment_name", "train_dataset")


def is_areal(data: Raw) -> bool:
    """Whether a file has AReaL's shape."""
    return sum(mark in data for mark in _MARKS) > 1


def refuse_companion(data: Raw) -> None:
    """Raises ConfigError for files beside AReaL's examples that describe no run."""
    if "resources" in data and "run" in data:
        raise ConfigError(
            "resources: this is a task for SkyPilot, which starts a run and describes none; use "
            "the YAML file that its `run` names"
        )
    if "env_vars" in data and len(data) == 1:
        raise ConfigError(
            "env_vars: these are environment variables, and no run; set them where you start one"
        )


def is_areal_key(key: str, ours: Collection[str]) -> bool:
    """Whether a dotted key means something in AReaL's files. ours: our sections."""
    section = key.partition(".")[0]
    return rule_of(key) is not None or (section in _SECTIONS and section not in ours)


def holds(data: Raw, key: str) -> bool:
    """Whether a file has a dotted key."""
    found: object = data
    for name in key.split("."):
        if not is_mapping(found) or name not in found:
            return False
        found = found[name]
    return True


def rule_of(key: str) -> Rule | None:
    """The rule of a dotted key: its own, else that of the innermost section that has one."""
    if key in _BY_KEY:
        return _BY_KEY[key]
    if (rule := _repeated(key)) is not None:
        return rule
    parts = key.split(".")
    sections = (".".join(parts[:depth]) for depth in range(len(parts), 0, -1))
    found = (_BY_KEY.get(section + BELOW) for section in sections)
    return next((rule for rule in found if rule is not None), None)


def is_sft(data: Raw) -> bool:
    """Whether a file is for supervised fine-tuning: nothing is sampled."""
    section = data.get("train_dataset")
    return is_mapping(section) and section.get("type") == "sft"


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
        self.sft = is_sft(data)
        for key, value in self.values.items():
            if rule_of(key) is None and value is not None:  # null removes a key
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


def _repeated(key: str) -> Rule | None:
    """Of the keys that many sections have, by their ends."""
    _, *parts = key.split(".")
    for start in range(len(parts)):
        end = ".".join(parts[start:])
        variables = re.sub(r"(?<=\benv_vars)\..*", "", end)
        if variables in REPEATED:
            return REPEATED[variables]
    return None


def _fix(key: str) -> str:
    *above, leaf = key.split(".")
    prefix = "".join(f"{name}." for name in above)
    known = {
        name.removeprefix(prefix).partition(".")[0]
        for name in (name.removesuffix(BELOW) for name in _BY_KEY)
        if name.startswith(prefix) and name != prefix
    }
    fix = nearest(leaf, known)
    if (not above and not fix.startswith("did")) or not known:
        top = key.partition(".")[0]
        return f"no option class of AReaL's has it; {top}=null leaves it out"
    return fix


def default_of(key: str) -> tuple[bool, Any]:
    """Whether AReaL's classes have a dotted key, and its value where a file leaves it out."""
    rule = rule_of(key)
    known = rule is not None and rule.how != "own"
    return known, rule.default if rule is not None and rule.key == key else None
