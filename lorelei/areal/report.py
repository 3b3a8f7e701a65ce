"""What became of every key of an AReaL file, as lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from lorelei.areal.backends import EXTRA, unused
from lorelei.areal.file import became, leaves, rule_of
from lorelei.areal.rule import Rule
from lorelei.areal.rules import RULES
from lorelei.areal.service_rules import REPEATED
from lorelei.areal.translate import Translation
from lorelei.config.errors import shown
from lorelei.config.section import Raw

REPLACED = {  # by what takes its place
    "total_train_epochs": "total_train_steps",
    "evaluator.freq_epochs": "evaluator.freq_steps",
    "actor.optimizer.warmup_steps_proportion": "actor.optimizer.warmup_steps",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyOutcome:
    """Of one key."""

    key: str
    value: Any
    became: Mapping[str, Any]  # {our key: value}; empty: nothing
    why: str
    default: bool = False  # AReaL's own value, which the file leaves out


def fates(translation: Translation) -> tuple[KeyOutcome, ...]:
    """Of all keys of the file in its order, then of AReaL's defaults that count."""
    ours = dict(leaves(translation.config))
    file = translation.file
    found = [_fate(key, value, ours, translation) for key, value in file.values.items()]
    others = tuple(f"{section}." for section in unused(file))
    for rule in RULES:
        counts = rule.key not in file.values and rule.how in ("copied", "made")
        if rule.default is None or not counts or rule.key.startswith(others):
            continue
        if taken := {k: ours[k] for k in became(rule.key, ours)}:
            found.append(
                KeyOutcome(
                    key=rule.key, value=rule.default, became=taken, why=rule.why, default=True
                )
            )
    return tuple(found)


def lines(translation: Translation, name: str) -> list[str]:
    """For people. name: of the file."""
    all_fates = fates(translation)
    used = [f for f in all_fates if f.became and not f.default]
    defaults = [f for f in all_fates if f.default]
    unused: dict[str, list[KeyOutcome]] = {}
    for fate in all_fates:
        if not fate.became:
            unused.setdefault(fate.why, []).append(fate)
    return [
        f"{name} is a file of AReaL; it becomes",
        *map(_line, used),
        *(["by AReaL's defaults", *map(_line, defaults)] if defaults else []),
        "not used",
        *(f"  {', '.join(map(_given, group))}: {why}" for why, group in unused.items()),
    ]


def _fate(key: str, value: Any, ours: Raw, translation: Translation) -> KeyOutcome:
    rule, taken = rule_of(key), Raw()
    if rule is None:
        why = "null: nothing is set"
    elif key.startswith(tuple(f"{section}." for section in unused(translation.file))):
        why = _not_chosen(key, translation)
    elif (other := REPLACED.get(key)) and translation.file.has(other):
        why = f"{other} takes its place"
    else:
        if rule.how in ("copied", "made") and value is not None:
            option = f".{key.rpartition('.')[2].replace('_', '-')}" if rule.ours == EXTRA else ""
            taken = {k: ours[k] for k in became(key, ours) if k.endswith(option)}
        why = rule.why if taken else _nothing(rule, value)
    return KeyOutcome(key=key, value=value, became=taken, why=why)


def _not_chosen(key: str, translation: Translation) -> str:
    """Why the section of an engine is not read."""
    if key.startswith("actor."):
        return f"actor.backend is {translation.config['train']['kind']}"
    if translation.file.sft:
        return "nothing is sampled with train_dataset.type: sft"
    return f"rollout.backend is {translation.config['rollout']['kind']}"


def _nothing(rule: Rule, value: Any) -> str:
    """Why a key becomes nothing."""
    if rule.how == "equal":
        return f"the same as {rule.equal_to}, as it must be"
    if value is None and rule.how != "ignored":
        return "null: nothing is set"
    if rule.how == "only":
        return "needs nothing here"
    if rule.how == "copied" or (rule.how == "made" and rule.ours):
        return "means nothing with the other settings"
    return rule.why


def _line(fate: KeyOutcome) -> str:
    became = ", ".join(f"{key}: {_text(value)}" for key, value in fate.became.items())
    note = f"  ({fate.why})" if fate.why else ""
    return f"  {_given(fate)}  ->  {became}{note}"


def _given(fate: KeyOutcome) -> str:
    return f"{fate.key}: {_text(fate.value)}"


def _text(value: object) -> str:
    """A value as YAML writes it."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, cast(Sequence[object], value)))}]"
    if isinstance(value, str):
        return value if len(value) <= 60 and "\n" not in value else shown(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return shown(value)


def tables() -> Iterator[tuple[str, Sequence[tuple[str, str, str]]]]:
    """For docs/areal.md: by section, rows of keys, what they become, how or why not."""
    by_section: dict[str, dict[tuple[str, str], list[str]]] = {}
    for rule in (*RULES, *(_anywhere(name, rule) for name, rule in REPEATED.items())):
        above, _, _ = rule.key.partition(".")
        section = "top level" if "." not in rule.key or rule.how == "own" else above
        rows = by_section.setdefault(section, {})
        key = above if rule.how == "own" else rule.key
        rows.setdefault((_outcome(rule), _note(rule)), []).append(f"`{key}`")
    for section, rows in by_section.items():
        yield section, [(", ".join(keys), *row) for row, keys in rows.items()]


def _anywhere(name: str, rule: Rule) -> Rule:
    return Rule(key=f"*.{name}", how=rule.how, why=rule.why)


def _outcome(rule: Rule) -> str:
    if rule.how == "own":
        return f"give `{rule.ours[0]}`" if rule.ours else "nothing"
    if rule.ours:
        return ", ".join(f"`{name}`" for name in rule.ours)
    match rule.how:
        case "equal":
            return f"must equal `{rule.equal_to}`"
        case "only":
            return "only " + (" or ".join(f"`{_text(a)}`" for a in rule.allowed) or "nothing")
        case "made":
            return "checked"
        case _:
            return "nothing"


def _note(rule: Rule) -> str:
    default = f"AReaL's default: {_text(rule.default)}" if rule.default is not None else ""
    return "; ".join(part for part in (rule.why, default) if part)
