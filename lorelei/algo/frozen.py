"""Frozen policies that settings of an algorithm name: a reference or a teacher.

    base              the base model, without an adapter
    FOLDER            an adapter in PEFT's format, such as `lorelei export` writes
    RUN:ADAPTER@vN    a version of an adapter in a run's folder

The train engine holds each adapter under the text that names it, which is also its `Policy`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from lorelei.config.section import Section
from lorelei.types import BASE, CURRENT

_MARK = "frozen policy"  # in the metadata of a field
_LIKE_VERSION = re.compile(r":[^/]*@[^/]*$")
_VERSION = re.compile(r"(.+):([a-z0-9][a-z0-9_-]{0,63})@v(\d+)")


def _checked(value: str) -> str:
    if value in ("", CURRENT):
        raise ValueError(f"write {BASE}, an adapter's FOLDER or RUN:ADAPTER@vN")
    if _LIKE_VERSION.search(value) and parse_version(value) is None:
        raise ValueError("a version of a run's adapter is written RUN:ADAPTER@vN")
    return value


FrozenPolicy = Annotated[str, AfterValidator(_checked), _MARK]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunVersion:
    """A version of an adapter in a run's folder."""

    run: Path
    adapter: str
    version: int


def parse_version(value: str) -> RunVersion | None:
    """What RUN:ADAPTER@vN names; None: it is a folder."""
    found = _VERSION.fullmatch(value)
    if found is None:
        return None
    run, adapter, version = found.groups()
    return RunVersion(run=Path(run), adapter=adapter, version=int(version))


def frozen_adapters(algo: Section) -> dict[str, str]:
    """{field: FOLDER or RUN:ADAPTER@vN} of the settings that name an adapter."""
    named = (name for name, field in type(algo).model_fields.items() if _MARK in field.metadata)
    values = {name: getattr(algo, name) for name in named}
    return {name: value for name, value in values.items() if value != BASE}


class WithReference(Section):
    """What an algorithm has that compares with a frozen policy."""

    reference: FrozenPolicy = Field(
        default=BASE,
        description="The frozen policy that it is held near: base, an adapter's folder in PEFT's "
        "format, or RUN:ADAPTER@vN; its path is relative to the YAML file.",
    )
