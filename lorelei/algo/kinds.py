"""Which algorithms there are: those of this folder's files, and those of a user's file."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Annotated, Any, cast, get_args

from pydantic import (
    BeforeValidator,
    GetJsonSchemaHandler,
    SerializeAsAny,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import CoreSchema

import lorelei.algo
from lorelei.algo.algorithm import Algorithm
from lorelei.config.errors import FieldError, describe, nearest, shown, unknown_key
from lorelei.config.optimizer import OptimizerConfig
from lorelei.config.section import is_mapping
from lorelei.user_file import load_function

DEFAULT = "grpo"


def _kinds() -> dict[str, type[Algorithm]]:
    found: dict[str, type[Algorithm]] = {}
    for module in pkgutil.iter_modules(lorelei.algo.__path__):
        if module.name == "kinds":
            continue
        for value in vars(importlib.import_module(f"lorelei.algo.{module.name}")).values():
            if inspect.isclass(value) and issubclass(value, Algorithm):
                for kind in get_args(value.model_fields["kind"].annotation):
                    found[kind] = value
    return dict(sorted(found.items()))


KINDS = _kinds()


def algorithm(data: Any) -> Any:
    """The algorithm of a mapping; kind: of KINDS (default: grpo), or 'my_file.py:MyClass'.

    Raises FieldError for a kind that is none, and for a field that the algorithm does not have.
    """
    if not is_mapping(data):
        return data
    kind = data.get("kind", DEFAULT)
    chosen = _class_of(kind)
    for key in map(str, data):
        if key not in chosen.model_fields:
            raise FieldError(key, _unknown(key, kind, chosen))
    try:
        return chosen.model_validate({**data, "kind": kind})
    except ValidationError as error:
        field, _, message = describe(error, data).partition(": ")
        raise FieldError(field, message) from error


def _unknown(key: str, kind: object, chosen: type[Algorithm]) -> str:
    others = [name for name, other in KINDS.items() if key in other.model_fields]
    if others:
        return f"has no effect with kind: {kind}, only with {', '.join(others)}; remove it"
    # keys of the optimizer may stand here too
    return unknown_key(key, [*chosen.model_fields, *OptimizerConfig.model_fields])


def _class_of(kind: object) -> type[Algorithm]:
    if isinstance(kind, str) and ".py:" in kind:
        found = cast(Callable[..., Any], load_function(kind, "algo.kind"))
        if inspect.isclass(found) and issubclass(found, Algorithm):
            return found
        raise FieldError("kind", f"{shown(kind)} is not a subclass of Algorithm")
    if isinstance(kind, str) and kind in KINDS:
        return KINDS[kind]
    raise FieldError("kind", f"{shown(kind)} is not allowed; {nearest(str(kind), KINDS)}")


class _AnyOfKinds:
    """The JSON schema of a field that takes any algorithm of KINDS."""

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        choices = [TypeAdapter(kind).json_schema() for kind in KINDS.values()]
        return {"oneOf": choices}


AlgoConfig = Annotated[SerializeAsAny[Algorithm], BeforeValidator(algorithm), _AnyOfKinds()]
