"""An AReaL file as a configuration of ours: the table applied, and what needs more than a table."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lorelei.algo.kinds import DEFAULT, fields_of
from lorelei.areal.backends import allocation, rollout_section, train_section
from lorelei.areal.contradictions import check
from lorelei.areal.data import data_sections
from lorelei.areal.file import ArealFile
from lorelei.areal.rules import RULES
from lorelei.config.errors import ConfigError
from lorelei.config.section import Raw, is_mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Translation:
    """An AReaL file translated to our schema."""

    file: ArealFile
    config: Raw
    missing: Mapping[str, str]  # {our key: why the file does not give it, and what does}


def translate(data: Raw, kind: object = DEFAULT) -> Translation:
    """Of a file without interpolations. Raises ConfigError for what cannot be meant or done.

    kind: of the algorithm; what only AReaL's own has is left out for another.
    """
    file = ArealFile(data)
    check(file)
    config: Raw = {"name": _name(file), "algo": {}, "rollout": {}}
    _copy(file, config)
    if "model" not in config:
        raise ConfigError("actor.path: is required, such as Qwen/Qwen2.5-1.5B-Instruct")
    parts = allocation(file)
    config["train"] = train_section(parts.train, "actor.backend") | config.get("train", {})
    config["rollout"] |= rollout_section(file, parts.rollout)
    config["adapters"] = {_plain(str(file.value("gconfig.lora_name", "default_lora"))): {}}
    _algorithm(file, config["algo"])
    config["algo"] = fields_of(kind, config["algo"])
    missing: dict[str, str] = {}
    data_sections(file, config, missing)
    return Translation(file=file, config=config, missing=missing)


def _copy(file: ArealFile, config: Raw) -> None:
    for rule in RULES:
        value = file.value(rule.key, rule.default)
        if rule.how == "copied" and value is not None:
            (ours,) = rule.ours
            put(config, ours, rule.convert(value) if rule.convert else value)


def _algorithm(file: ArealFile, algo: Raw) -> None:
    """What follows from several keys; `algo` has what was copied."""
    for norm in ("reward_norm", "adv_norm"):
        given = file.has_section(f"actor.{norm}")
        levels = (
            file.values.get(f"actor.{norm}.{k}", "batch") for k in ("mean_level", "std_level")
        )
        mean, std = ("none" if level is None else level for level in levels)
        algo[norm] = {"mean_level": mean, "std_level": std} if given else None
    decoupled, recompute = algo["use_decoupled_loss"], file.value("actor.recompute_logprob", False)
    if recompute or not decoupled:  # which implies it
        algo["recompute_logprob"] = recompute
    if not decoupled:
        algo.pop("rejection_sampling", None)  # AReaL does nothing with it then
    elif file.has_section("actor.rejection_sampling"):
        algo["rejection_sampling"].setdefault("upper", 5.0)


def put(config: Raw, dotted: str, value: object) -> None:
    """Set a dotted key of nested mappings."""
    *above, last = dotted.split(".")
    for key in above:
        below = config.setdefault(key, {})
        assert is_mapping(below), f"{dotted}: {key} is a value"
        config = below
    config[last] = value


def _name(file: ArealFile) -> str:
    """Of the run, from that of experiment and trial."""
    given = (file.value("experiment_name"), file.value("trial_name"))
    return _plain("-".join(str(name) for name in given if name)) or "run"


def _plain(name: str) -> str:
    """A name as runs and adapters may have it."""
    return re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-_")[:64]
