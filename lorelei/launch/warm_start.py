"""Whether adapters to start from, and frozen ones, are of the run's base model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorelei.config.run import RunConfig
from lorelei.launch.frozen import named_adapters, origin_of
from lorelei.lora.origin import Origin
from lorelei.model.fingerprint import model_digests
from lorelei.model.locate import find_model, resolve_model
from lorelei.store.change import Change, change


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmStarts:
    """What was found, beside adapters that fit."""

    changes: Sequence[Change]  # accepted ones of another base model
    warnings: Sequence[str]


def check_warm_starts(config: RunConfig, accept: Sequence[str]) -> WarmStarts:
    """Compare the base models of `lora.init_from` and of frozen adapters with the run's.

    By what they hold where that is known, else by name.

    accept: fields that may name an adapter of another one. Raises ValueError.
    """
    changes: list[Change] = []
    warnings: list[str] = []
    fields: list[str] = []
    here: Mapping[str, str] = {}
    for field, named in (*_starts(config), *named_adapters(config)):
        fields.append(field)
        origin = origin_of(named)
        here = here or model_digests(resolve_model(config.model))
        if not origin.base:
            warnings += _by_name(field, origin, config.model, here)
        elif origin.base.get("weights") != here["weights"]:
            if field not in accept:
                raise ValueError(
                    f"{field}: the adapter in {named!r} was trained on another base"
                    f" model, {origin.name!r}, whose weights are not those of {config.model!r}; "
                    f"use that model, or accept it with --accept-changed {field}"
                )
            changes.append(change(field, dict(origin.base), dict(here), "train"))
        elif origin.base != here:
            odd = sorted(n for n in {**origin.base, **here} if origin.base.get(n) != here.get(n))
            warnings.append(
                f"{field}: the adapter was trained on these weights with other files beside "
                f"them: {', '.join(odd)}"
            )
    if unknown := [field for field in accept if field not in fields]:
        there = ", ".join(fields) or "none, no adapter starts from another or names one"
        raise ValueError(f"--accept-changed: {unknown[0]!r} is not one of: {there}")
    return WarmStarts(changes=changes, warnings=warnings)


def _starts(config: RunConfig) -> Iterator[tuple[str, str]]:
    for e in config.experiments():
        if e.lora.init_from is not None:
            prefix = f"adapters.{e.name}." if config.adapters else ""
            yield f"{prefix}lora.init_from", e.lora.init_from


def _by_name(field: str, origin: Origin, model: str, here: Mapping[str, str]) -> list[str]:
    """A warning about an adapter that others wrote, which names its base model only."""
    name = origin.name
    if name is None or name == model:
        return []
    # a relative folder was one where the adapter was written
    known = find_model(name) if Path(name).is_absolute() or name.count("/") == 1 else None
    if known is not None:
        same = model_digests(known)["weights"] == here["weights"]
    else:
        same = Path(name).name.lower() == Path(model).name.lower()
    if same:
        return []
    return [
        f"{field}: its adapter_config.json says that it was trained on {name!r}, and the run's "
        f"model is {model!r}; an adapter of other weights is worth little more than a random one"
    ]
