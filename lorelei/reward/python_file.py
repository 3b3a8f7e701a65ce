"""A reward function in a user's Python file, `rewards.py:my_reward`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from lorelei.config.errors import shown
from lorelei.reward.contract import Scorer
from lorelei.user_file import accepted, load_function


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
    function = load_function(path, "reward.path")
    name = path.rpartition(":")[2]
    parameters = inspect.signature(function).parameters
    if "completions" in parameters:
        return _batch(function)
    if "completion" in parameters:
        return _single(function)
    raise ValueError(
        f"reward.path: {name}({', '.join(parameters)}) must have a parameter 'completion' "
        "(one text) or 'completions' (TRL's list)"
    )


def _single(function: Callable[..., object]) -> Scorer:
    def score(data: Mapping[str, Any], completion: str) -> object:
        return function(**accepted(function, {**data, "completion": completion}))

    return score


def _batch(function: Callable[..., object]) -> Scorer:
    def score(data: Mapping[str, Any], completion: str) -> object:
        chat = isinstance(data.get("prompt"), list)
        reply = [{"role": "assistant", "content": completion}] if chat else completion
        columns = {**data, "prompts": data.get("prompt"), "completions": reply}
        columns.pop("prompt", None)  # TRL passes it as `prompts` only
        found: object = function(**accepted(function, {k: [v] for k, v in columns.items()}))
        scores = cast(Sequence[object], found) if isinstance(found, list | tuple) else ()
        if len(scores) != 1:
            raise ValueError(
                f"one completion needs a list of one score, not {shown(cast(object, found))}"
            )
        return scores[0]

    return score
