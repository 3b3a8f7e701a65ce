"""A function in a user's Python file, `file.py:function`."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from lorelei.config.errors import nearest


def load_function(path: str, field: str) -> Callable[..., Any]:
    """The function (or class) behind 'file.py:function'. Runs the file, once for each content.

    field: what the configuration calls it, for errors. Raises ValueError when the file or the
    function is not right.
    """
    file, _, name = path.rpartition(":")
    if not file or not name.isidentifier():
        raise ValueError(f"{field}: {path!r} must be a file and a function, 'file.py:function'")
    module = _import(Path(file), field)
    function = getattr(module, name, None)
    if not callable(function):
        known = [
            n
            for n, v in vars(module).items()
            if (inspect.isfunction(v) or inspect.isclass(v)) and v.__module__ == module.__name__
        ]
        raise ValueError(f"{field}: {file} has no function {name!r}; {nearest(name, known)}")
    return function


def accepted(function: Callable[..., object], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that the function's parameters ask for. Raises ValueError for one not there."""
    parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    missing = [p.name for p in named if p.default is p.empty and p.name not in values]
    if missing:
        raise ValueError(f"no column {missing[0]!r} in the row; it has {', '.join(values)}")
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(values)
    return {p.name: values[p.name] for p in named if p.name in values}


def _import(file: Path, field: str) -> ModuleType:
    if not file.is_file():
        raise ValueError(f"{field}: there is no file {file.absolute()}")
    where = hashlib.sha256(str(file.resolve()).encode() + file.read_bytes()).hexdigest()[:8]
    name = f"lorelei_user_{file.stem}_{where}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{field}: {file} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as if run as a script: siblings import
    sys.modules[spec.name] = module  # dataclasses and pickling in the file look it up
    try:
        spec.loader.exec_module(module)
    # The border to the user's code: whatever importing it raises is the user's to read.
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise ValueError(
            f"{field}: importing {file} failed: {type(error).__name__}: {error}"
        ) from error
    return module
