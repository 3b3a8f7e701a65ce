"""A reward function in a user's Python file, `rewards.py:my_reward`."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from lorelei.config.errors import nearest, shown
from lorelei.reward.contract import Scorer


def load(path: str) -> Scorer:
    """The function behind 'file.py:function' as a scorer. Runs the file, so only in a worker.

    Two signatures are known by their parameter names; each is given the columns it names, or all
    of them if it takes **kwargs:

    - one sample: `(completion, answer, ...)`. `completion` is the text, `prompt` the user's text
      or, for rows that brought chat messages, the list of messages.
    - TRL's batch, `(completions, ...)`, called with lists of one; it returns a list of one.
      Completions are strings, or `[{"role": "assistant", "content": text}]` for rows that
      brought chat messages, as in TRL.

    Raises ValueError when the file, the function or its parameters are not right.
    """
    file, _, name = path.rpartition(":")
    if not file or not name.isidentifier():
        raise ValueError(f"reward.path: {path!r} must be a file and a function, 'rewards.py:score'")
    module = _import(Path(file))
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n, v in vars(module).items() if inspect.isfunction(v)]
        raise ValueError(f"reward.path: {file} has no function {name!r}; {nearest(name, known)}")
    parameters = inspect.signature(function).parameters
    if "completions" in parameters:
        return _batch(function)
    if "completion" in parameters:
        return _single(function)
    raise ValueError(
        f"reward.path: {name}({', '.join(parameters)}) must have a parameter 'completion' "
        "(one text) or 'completions' (TRL's list)"
    )


def _import(file: Path) -> ModuleType:
    if not file.is_file():
        raise ValueError(f"reward.path: there is no file {file.absolute()}")
    spec = importlib.util.spec_from_file_location(f"lorelei_reward_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"reward.path: {file} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.resolve().parent))  # as if run as a script: siblings import
    sys.modules[spec.name] = module  # dataclasses and pickling in the file look it up
    try:
        spec.loader.exec_module(module)
    # The border to the user's code: whatever importing it raises is the user's to read.
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"reward.path: importing {file} failed: {type(error).__name__}: {error}"
        ) from error
    return module


def _single(function: Callable[..., object]) -> Scorer:
    def score(data: Mapping[str, Any], completion: str) -> object:
        return function(**_accepted(function, {**data, "completion": completion}))

    return score


def _batch(function: Callable[..., object]) -> Scorer:
    def score(data: Mapping[str, Any], completion: str) -> object:
        chat = isinstance(data.get("prompt"), list)
        reply = [{"role": "assistant", "content": completion}] if chat else completion
        columns = {**data, "prompts": data.get("prompt"), "completions": reply}
        columns.pop("prompt", None)  # TRL passes it as `prompts` only
        scores = function(**_accepted(function, {k: [v] for k, v in columns.items()}))
        if not isinstance(scores, list | tuple) or len(scores) != 1:
            raise ValueError(f"one completion needs a list of one score, not {shown(scores)}")
        return scores[0]

    return score


def _accepted(function: Callable[..., object], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that the function's parameters ask for."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(values)
    named = [p for p in parameters if p.kind is not p.VAR_POSITIONAL]
    missing = [p.name for p in named if p.default is p.empty and p.name not in values]
    if missing:
        raise ValueError(f"no column {missing[0]!r} in the row; it has {', '.join(values)}")
    return {p.name: values[p.name] for p in named if p.name in values}
