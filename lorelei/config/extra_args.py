"""Options of a server that we do not model."""

from __future__ import annotations

from collections.abc import Mapping

from lorelei.config.errors import FieldError


def check_extra_args(extra_args: Mapping[str, object], derived: Mapping[str, str]) -> None:
    """derived: options that follow from the run, and from what. Raises FieldError for one."""
    for name in extra_args:
        plain = name.strip("-").replace("_", "-")
        if plain in derived:
            raise FieldError(
                f"extra_args.{name}", f"follows from {derived[plain]}; remove it and set that"
            )
