"""What every section of the configuration has in common."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeGuard, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, model_validator

from lorelei.config.errors import FieldError, nearest, shown, unknown_key

Raw = dict[str, Any]  # plain values, as YAML and JSON have them

NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")  # safe as a path component


def _checked_name(name: str) -> str:
    if NAME_PATTERN.fullmatch(name) is None:
        raise ValueError(
            "a name has 1 to 64 characters of a-z, 0-9, '_' and '-', and starts with a-z or 0-9"
        )
    return name


Name = Annotated[str, AfterValidator(_checked_name)]


def _one_or_many(value: object) -> object:
    return (value,) if isinstance(value, str) else value


Words = Annotated[tuple[str, ...], BeforeValidator(_one_or_many)]  # one needs no list

FUNCTION = re.compile(r".+\.py:[A-Za-z_]\w*")


def in_a_file(example: str) -> AfterValidator:
    """Refuses what is not a function in a file, and shows the example."""

    def check(value: str) -> str:
        if FUNCTION.fullmatch(value) is None:
            raise ValueError(f"write FILE.py:FUNCTION, such as {example}")
        return value

    return AfterValidator(check)


def is_mapping(value: object) -> TypeGuard[dict[str, Any]]:
    """Whether the value was written as key: value lines."""
    return isinstance(value, dict)


class Section(BaseModel):
    """A frozen mapping with known keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    refused: ClassVar[Mapping[str, str]] = {}  # keys that users may expect here: why they are not

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        if is_mapping(data):
            for key in map(str, data):
                if key in cls.refused:
                    raise FieldError(key, cls.refused[key])
                if key not in cls.model_fields:
                    raise FieldError(key, unknown_key(key, cls.model_fields))
        return data


def tagged(*sections: type[Section], default: str | None = None) -> BeforeValidator:
    """Refuses a mapping whose `kind` is none of those of `sections`, and says which they are.

    default: the kind of a mapping without one.
    """
    kinds = [get_args(section.model_fields["kind"].annotation)[0] for section in sections]

    def check(data: Any) -> Any:
        if is_mapping(data):
            if "kind" not in data:
                if default is not None:
                    return {"kind": default, **data}
                raise FieldError("kind", f"is required; allowed: {', '.join(kinds)}")
            if data["kind"] not in kinds:
                fix = nearest(str(data["kind"]), kinds)
                raise FieldError("kind", f"{shown(data['kind'])} is not allowed; {fix}")
        return data

    return BeforeValidator(check)
