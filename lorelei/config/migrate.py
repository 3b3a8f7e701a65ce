"""Configurations as earlier versions wrote them into run folders, with every default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from lorelei.algo.kinds import DEFAULT, KINDS
from lorelei.config.optimizer import OptimizerConfig


def config_of_format_1(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without the fields of `algo` that its kind does not have: they had no effect.

    Format 1 knew one set of fields for all kinds, those of the optimizer among them, which stay:
    they go on to be read there.
    """
    entries = cast(Mapping[str, Mapping[str, Any]], config.get("adapters") or {})
    adapters = {name: _without_unused(entry) for name, entry in entries.items()}
    return {**_without_unused(config), "adapters": adapters}


def _without_unused(sections: Mapping[str, Any]) -> dict[str, Any]:
    algo: Mapping[str, Any] | None = sections.get("algo")
    if algo is None:
        return dict(sections)
    chosen = KINDS[algo.get("kind", DEFAULT)]
    known = {*chosen.model_fields, *OptimizerConfig.model_fields}
    return {**sections, "algo": {key: value for key, value in algo.items() if key in known}}
