"""Reading and writing the configuration file, with dotted overrides.

Relative paths of files (task.path, env.path, env.tools, reward.path, lora.init_from, algo.teacher,
algo.reference, algo.kind of a class in a file, and a model that starts with '.') are taken from the
YAML file's folder, those in command-line overrides from the working directory; both are made
absolute here, and so is a model, or a data set of kind hf, that is a folder in the working
directory. runs_dir is relative to the working directory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import ValidationError

from lorelei.areal.file import (
    became,
    default_of,
    holds,
    is_areal,
    is_areal_key,
    leaves,
    refuse_companion,
)
from lorelei.areal.interpolation import resolve
from lorelei.areal.translate import Translation, require, translate
from lorelei.config.errors import ConfigError, FieldError, describe, shown
from lorelei.config.experiment import SAMPLED
from lorelei.config.optimizer import from_algo
from lorelei.config.run import RunConfig
from lorelei.config.section import Raw, is_mapping
from lorelei.types import BASE, CURRENT


class _Loader(yaml.SafeLoader):
    """YAML with 1e-4 read as a number, and without keys given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key.value!r} is given twice; remove one", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


# YAML 1.1 wants a dot and a sign in the exponent, and reads 1e-4 as text
_Loader.add_implicit_resolver(  # pyright: ignore[reportUnknownMemberType]
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The checked configuration of a YAML file, with overrides such as 'optimizer.lr=1e-4'.

    Raises ConfigError: one line with the dotted field, its value, what is allowed and the fix.
    """
    return read_config(path, overrides).config


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A configuration, and how it was made of an AReaL file."""

    config: RunConfig
    translation: Translation | None  # None: the file was ours


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> Loaded:
    """`load_config`, and what became of an AReaL file's keys."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read: {reason}") from error
    data = _parse(text, str(path))
    if data is None:  # an empty file
        data = Raw()
    if not is_mapping(data):
        raise ConfigError(f"{path}: {shown(data)} is not a configuration; write key: value lines")
    translation, theirs = None, set[str]()
    if is_areal(data):
        theirs = {override for override in overrides if _is_theirs(override, data)}
        for override in overrides:
            if override in theirs:
                _override(data, _from_here(override))
        translation = translate(
            resolve(data, default_of), _kind(o for o in overrides if o not in theirs)
        )
        data = translation.config
    else:
        refuse_companion(data)
    config = _absolute(moved(data), path.resolve().parent)
    translated = dict(leaves(deepcopy(config)))
    for override in overrides:
        if override in theirs:  # one of ours before it may have set what it became
            for key in became(_key(override), translated):
                set_key(config, key, translated[key])
        else:
            _override(config, override)
            config = moved(config, replace=True)
    if translation is not None:
        require(translation, config)
    config = absolute_here(config)
    config.setdefault("name", path.stem)
    return Loaded(config=validate(config), translation=translation)


def validate(data: Raw) -> RunConfig:
    """A configuration from plain values. Raises ConfigError like `load_config`."""
    data = moved(data)  # errors name the keys where they belong
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(describe(error, data)) from error


def moved(data: Raw, *, replace: bool = False) -> Raw:
    """`data` with keys of the optimizer moved out of `algo`, of the run and of every adapter.

    Raises ConfigError for one that stands in both, unless that in `algo` is newer.
    """
    where = ""
    try:
        data = from_algo(data, replace=replace)
        adapters = data.get("adapters")
        if is_mapping(adapters):
            moved = Raw()
            for name, entry in adapters.items():
                where = f"adapters.{name}."
                moved[name] = from_algo(entry, replace=replace)
            data = {**data, "adapters": moved}
    except FieldError as error:
        raise ConfigError(f"{where}{error}") from error
    return data


def _kind(overrides: Iterable[str]) -> object:
    """The algorithm that overrides choose; None: they do not."""
    chosen = Raw()
    for override in overrides:
        if _key(override).partition(".")[0] == "algo":
            _override(chosen, override)
    algo = _absolute(chosen, Path.cwd()).get("algo")
    return algo.get("kind") if is_mapping(algo) else None


def dump_set(config: RunConfig) -> str:
    """What was set, and not the defaults, as a YAML file that gives the same configuration."""
    data = config.model_dump(mode="json", exclude_unset=True)
    first = {key: data.pop(key) for key in ("name", "model")}
    return yaml.safe_dump({**first, **data}, sort_keys=False, allow_unicode=True)


def to_plain(config: RunConfig) -> Raw:
    """JSON values with every default written out, so that later defaults change nothing.

    `validate` makes a configuration with the same experiments of them.
    """
    data = config.model_dump(mode="json", exclude={"adapters"})
    if not any(experiment.samples for experiment in config.experiments()):
        data = _without_sampling(data)
    elif not config.adapters:
        data["eval"]["every"] = config.experiments()[0].eval.every  # 0 where nothing is scored
    adapters: Raw = {}
    for experiment in config.experiments() if config.adapters else ():
        entry = experiment.model_dump(mode="json", exclude={"name"})
        sampling = config.rollout.per_adapter
        entry["rollout"] = {k: v for k, v in entry["rollout"].items() if k in sampling}
        if entry["reward"] is None:
            del entry["reward"]
        adapters[experiment.name] = entry if experiment.samples else _without_sampling(entry)
    return {"name": config.name, "model": config.model, **data, "adapters": adapters}


def _without_sampling(sections: Raw) -> Raw:
    """The sections of an adapter that samples nothing, without what means nothing to it."""
    kept = {name: section for name, section in sections.items() if name not in SAMPLED}
    for name, keys in SAMPLED.items():
        if keys is not None and is_mapping(section := sections.get(name)):
            kept[name] = {k: v for k, v in section.items() if k not in keys}
    return kept


def dump_config(config: RunConfig) -> str:
    """`to_plain` as a YAML file."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True)


def json_schema() -> Raw:
    """The JSON schema of a configuration file, for editors and readers."""
    return RunConfig.model_json_schema()


def _parse(text: str, where: str) -> object:
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{where}{line}: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from error


def _key(override: str) -> str:
    return override.partition("=")[0].strip()


def _from_here(override: str) -> str:
    """An override of a path in AReaL's words, which the file's folder does not move any more."""
    key, equals, value = override.partition("=")
    if key.strip().endswith("path") and value.startswith((".", "~")):
        value = _join(Path.cwd(), value)
    return f"{key}{equals}{value}"


def _is_theirs(override: str, data: Raw) -> bool:
    """Whether an override belongs into the AReaL file `data`: key=null removes what is there."""
    key = _key(override)
    removes = _parse(override.partition("=")[2], f"override {override!r}") is None
    return is_areal_key(key, RunConfig.model_fields) or (removes and holds(data, key))


def _override(config: Raw, override: str) -> None:
    """Set one dotted key of `config`, in place."""
    set_key(config, *split_override(override))


def split_override(override: str) -> tuple[str, object]:
    """The dotted key and the value of 'optimizer.lr=1e-4'. Raises ConfigError."""
    dotted, equals, text = override.partition("=")
    if not equals or not all(dotted.strip().split(".")):
        raise ConfigError(f"override {override!r}: write key=value, such as optimizer.lr=1e-4")
    return dotted.strip(), _parse(text, f"override {override!r}")


def set_key(config: Raw, dotted: str, value: object) -> None:
    """Set one dotted key of `config`, in place. Raises ConfigError below a plain value."""
    keys = dotted.split(".")
    section = config
    for depth, key in enumerate(keys[:-1], start=1):
        if section.get(key) is None:  # absent, or `key:` with nothing behind it
            section[key] = {}
        below = section[key]
        if not is_mapping(below):
            above = ".".join(keys[:depth])
            raise ConfigError(f"{dotted}: {above} is {shown(below)}, which has no keys to set")
        section = below
    section[keys[-1]] = value


def _absolute(config: Raw, folder: Path) -> Raw:
    """A copy of `config` in which the relative paths of files start at `folder`."""
    config = _absolute_sections(config, folder, kind_above=None)
    model = config.get("model")
    if isinstance(model, str) and model.startswith((".", "~")):
        config["model"] = _join(folder, model)
    adapters = config.get("adapters")
    if is_mapping(adapters):
        task = config.get("task")
        kind = task.get("kind") if is_mapping(task) else None
        config["adapters"] = {
            name: _absolute_sections(entry, folder, kind) if is_mapping(entry) else entry
            for name, entry in adapters.items()
        }
    return config


def absolute_here(config: Raw) -> Raw:
    """A copy of `config` that means the same in every working directory, as far as it reads."""
    config = _absolute(config, Path.cwd())
    model = config.get("model")
    if isinstance(model, str) and model and Path(model).is_dir():  # a folder goes before the hub
        config["model"] = _join(Path.cwd(), model)
    return config


def _absolute_sections(sections: Raw, folder: Path, kind_above: object) -> Raw:
    sections = dict(sections)
    for name, key in (
        ("task", "path"),
        ("env", "path"),
        ("reward", "path"),
        ("lora", "init_from"),
    ):
        section = sections.get(name)
        if not is_mapping(section):
            continue
        section = dict(section)
        path = section.get(key)
        # the path of an hf task is a name on the hub, unless it is a folder
        on_hub = name == "task" and section.get("kind", kind_above) == "hf"
        if isinstance(path, str) and path and (not on_hub or _is_folder(folder, path)):
            section[key] = _join(folder, path)
        if name == "env" and isinstance(tools := section.get("tools"), list):
            section["tools"] = [_in_file(folder, tool) for tool in cast(list[object], tools)]
        sections[name] = section
    if is_mapping(algo := sections.get("algo")):
        sections["algo"] = algo = dict(algo)
        if "kind" in algo:
            algo["kind"] = _in_file(folder, algo["kind"])
        for key in ("teacher", "reference"):
            if isinstance(named := algo.get(key), str) and named not in ("", BASE, CURRENT):
                algo[key] = _join(folder, named)
    return sections


def _is_folder(folder: Path, path: str) -> bool:
    """Whether a name that may be one on the hub is a folder."""
    if path.startswith((".", "~")):
        return (folder / Path(path).expanduser()).is_dir()
    return folder == Path.cwd() and (folder / path).is_dir()


def _in_file(folder: Path, name: object) -> object:
    """What is in a file of the user's; names of what is built in have no colon."""
    return _join(folder, name) if isinstance(name, str) and ".py:" in name else name


def _join(folder: Path, path: str) -> str:
    return str((folder / os.path.expanduser(path)).resolve())
