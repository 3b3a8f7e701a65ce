"""Which algorithms there are: those of this folder's files, and those of a user's file."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Annotated, Any, get_args

from pydantic import BeforeValidator, GetJsonSchemaHandler, SerializeAsAny, ValidationError
from pydantic_core import CoreSchema

import lorelei.algo
from lorelei.algo.algorithm import Algorithm, Job
from lorelei.algo.importance import RatioAlgorithm
from lorelei.algo.loss import load_loss
from lorelei.config.errors import FieldError, describe, nearest, shown, unknown_key
from lorelei.config.optimizer import OptimizerConfig
from lorelei.config.section import Section, is_mapping
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
    chosen = class_of(kind)
    for key in map(str, data):
        if key not in chosen.model_fields:
            raise FieldError(key, _unknown(key, kind, chosen))
    try:
        made = chosen.model_validate({**data, "kind": kind})
    except ValidationError as error:
        field, _, message = describe(error, data, "algo").partition(": ")
        raise FieldError(field.removeprefix("algo").lstrip(".") or "kind", message) from error
    if kind not in KINDS:
        _check_loss(made)
    return made


def class_of(kind: object) -> type[Algorithm]:
    """The settings of a kind. Runs a user's file. Raises FieldError for a kind that is none."""
    if isinstance(kind, str) and kind in KINDS:
        return KINDS[kind]
    if not isinstance(kind, str) or ".py:" not in kind:
        choices = f"{nearest(str(kind), KINDS)}, or a class of yours, my_file.py:MyClass"
        raise FieldError("kind", f"{shown(kind)} is not allowed; {choices}")
    try:
        found = load_function(kind, "kind")
    except ValueError as error:
        line = " ".join(str(error).split())
        raise FieldError("kind", line.removeprefix("kind: ")) from error
    name = short_name(kind)
    if not (inspect.isclass(found) and issubclass(found, Algorithm)):
        raise FieldError("kind", f"{name} is not a subclass of Algorithm")
    if getattr(found, "job", None) not in get_args(Job):
        raise FieldError(
            "kind", f"{name} says no job that feeds it; derive it from PolicyAlgorithm"
        )
    return found


def fields_of(kind: object, values: dict[str, Any]) -> dict[str, Any]:
    """What of `values` a kind has; all of them for a kind that is none, which others refuse."""
    try:
        known = class_of(kind).model_fields
    except FieldError:
        return values
    return {key: value for key, value in values.items() if key in known}


def short_name(kind: str) -> str:
    """A kind for tables and figures: of a user's class without the folders of its file."""
    return kind.rpartition(":")[2]


def expansion(made: Algorithm) -> str:
    """What an algorithm with a ratio is beside grpo's defaults, in a line; of another one: ''."""
    plain = KINDS[DEFAULT](kind=DEFAULT)
    known = type(plain).model_fields
    if not isinstance(made, RatioAlgorithm) or made.kind == plain.kind:
        return ""
    own = [
        f"{name}: {_plain(getattr(made, name))}"
        for name in type(made).model_fields
        if name not in ("kind", "batch_size")
        and (name not in known or getattr(made, name) != getattr(plain, name))
    ]
    preset = made.loss().path == plain.loss().path
    return f"{DEFAULT} with {', '.join(own if preset else ['another loss', *own])}"


def _plain(value: object) -> str:
    """A setting as YAML has it; of a section what is not its default."""
    if isinstance(value, Section):
        fields = type(value).model_fields
        held = {name: getattr(value, name) for name in fields}
        set_to = {k: v for k, v in held.items() if v != fields[k].default} or held
        return f"{{{', '.join(f'{name}: {_plain(one)}' for name, one in set_to.items())}}}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value}"


def _check_loss(made: Algorithm) -> None:
    """Raises FieldError where a user's class gives no loss that other processes can import."""
    try:
        load_loss(made.loss())
    except NotImplementedError:
        raise FieldError("kind", f"{short_name(made.kind)} has no method `loss`") from None
    except ValueError as error:
        raise FieldError("kind", f"{short_name(made.kind)}: {error}") from error


def _unknown(key: str, kind: object, chosen: type[Algorithm]) -> str:
    others = [name for name, other in KINDS.items() if key in other.model_fields]
    if others:
        name = short_name(str(kind))
        return f"has no effect with kind: {name}, only with {', '.join(others)}; remove it"
    # keys of the optimizer may stand here too
    return unknown_key(key, [*chosen.model_fields, *OptimizerConfig.model_fields])


class _AnyOfKinds:
    """The JSON schema of a field that takes any algorithm of KINDS, or one of a user's file."""

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        choices = [handler(kind.__pydantic_core_schema__) for kind in KINDS.values()]
        path = {"type": "string", "pattern": r"\.py:[A-Za-z_]\w*$"}
        own = {"type": "object", "properties": {"kind": path}, "required": ["kind"]}
        return {"anyOf": [*choices, own]}


AlgoConfig = Annotated[SerializeAsAny[Algorithm], BeforeValidator(algorithm), _AnyOfKinds()]
