"""The calls of TrainEngine, read off the protocol, for engines that pass them on to others.

So a method that is added to the protocol is written there and in the engines that do its work;
wire, workers and restarts take it from here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from lorelei.train.contract import TrainEngine

# all but close(), which ends the object itself
CALLS: Mapping[str, inspect.Signature] = {
    name: inspect.signature(method)
    for name, method in vars(TrainEngine).items()
    if inspect.isfunction(method) and not name.startswith("_") and name != "close"
}

T = TypeVar("T")


def forwards(engine: type[T]) -> type[T]:
    """Give a class the calls that it does not write out: each is `forward(method, args)`.

    args: by position, with defaults filled in.
    """
    for name in CALLS.keys() - vars(engine).keys():
        setattr(engine, name, _forwarding(name))
    return engine


def _forwarding(name: str) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **named: Any) -> Any:
        bound = CALLS[name].bind(self, *args, **named)
        bound.apply_defaults()
        return self.forward(name, bound.args[1:])

    return call
