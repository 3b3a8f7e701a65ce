"""A reward function in a user's Python file, `rewards.py:my_reward`."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from lorelei.reward.contract import Sample, Scorer
from lorelei.user_file import accepted, load_function

# what TRL also passes, and is not known here
_TRL_ONLY = frozenset(
    {"completion_ids", "completions_ids", "trainer_state", "log_extra", "log_metric"}
)


def load(path: str) -> Scorer:
    """The function behind 'file.py:function' as a scorer. Runs the file, so only in a worker.

    It may be async, an instance with __call__, or a class that makes one without arguments. Two
    signatures are known by their parameter names; each is given the columns it names, or all of
    them if it takes **kwargs:

    - one sample: `(completion, answer, ...)`. `completion` is the text, `prompt` the user's text
      or, for rows that brought chat messages, the list of messages.
    - TRL's list form, `(completions, ...)`, called with all completions of a prompt; every
      argument is a list with an element for each, and it returns a list of as many scores.
      Completions are strings, or `[{"role": "assistant", "content": text}]` for rows that
      brought chat messages, as in TRL.

    Raises ValueError when the file, the function or its parameters are not right.
    """
    function = load_function(path, "reward.path")
    name = path.rpartition(":")[2]
    if inspect.isclass(function):
        function = _instance(name, function)
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:  # of a built-in function
        raise ValueError(f"reward.path: the parameters of {name} are not known: {error}") from error
    if any(p.kind is p.POSITIONAL_ONLY for p in parameters.values()):
        raise ValueError(
            f"reward.path: {name}{inspect.signature(function)} must take its arguments by name; "
            "remove the '/'"
        )
    needed = {n for n, p in parameters.items() if p.default is p.empty}
    if "completions" in parameters:
        if unknown := sorted(needed & _TRL_ONLY):
            raise ValueError(
                f"reward.path: {name} asks for TRL's {unknown[0]!r}, which is not given here; "
                "give it a default, or remove it"
            )
        return Scorer(call=_batch(function), whole_group=True)
    if "completion" in parameters:
        return Scorer(call=_single(function))
    raise ValueError(
        f"reward.path: {name}({', '.join(parameters)}) must have a parameter 'completion' "
        "(one text) or 'completions' (TRL's list)"
    )


def _instance(name: str, cls: Callable[..., Any]) -> Callable[..., object]:
    try:
        made = cls()
    # The border to the user's code.
    except Exception as error:
        raise ValueError(
            f"reward.path: {name}() failed: {type(error).__name__}: {error}; name an instance, "
            f"such as judge = {name}(...)"
        ) from error
    if not callable(made):
        raise ValueError(f"reward.path: the class {name} has no __call__; write one")
    return made


def _single(function: Callable[..., object]) -> Callable[[Sequence[Sample]], object]:
    def call(samples: Sequence[Sample]) -> object:
        (one,) = samples
        found = function(**accepted(function, {**one.data, "completion": one.completion}))
        return _listed(found) if inspect.isawaitable(found) else [found]

    return call


async def _listed(found: Awaitable[object]) -> list[object]:
    return [await found]


def _batch(function: Callable[..., object]) -> Callable[[Sequence[Sample]], object]:
    def call(samples: Sequence[Sample]) -> object:
        rows = [_trl_row(one) for one in samples]
        columns = {name: [row.get(name) for row in rows] for name in rows[0]}
        return function(**accepted(function, columns))

    return call


def _trl_row(one: Sample) -> dict[str, Any]:
    chat = isinstance(one.data.get("prompt"), list)
    reply = [{"role": "assistant", "content": one.completion}] if chat else one.completion
    row = {**one.data, "prompts": one.data.get("prompt"), "completions": reply}
    row.pop("prompt", None)  # TRL passes it as `prompts` only
    return row
