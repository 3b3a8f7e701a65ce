"""The calls of TrainEngine, read off the protocol, for engines that pass them on to others.

So a method that is added to the protocol is written there and in the engines that do its work;
wire, workers and restarts take it from here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from lorelei.train.contract import TrainEngine, is_change

# all but close(), which ends the object itself
CALLS: Mapping[str, inspect.Signature] = {
    name: inspect.signature(method)
    for name, method in vars(TrainEngine).items()
    if inspect.isfunction(method) and not name.startswith("_") and name != "close"
}
CHANGES = frozenset(name for name in CALLS if is_change(getattr(TrainEngine, name)))


class Forwarder(Protocol):
    """What passes calls on."""

    def forward(self, method: str, args: tuple[Any, ...]) -> Any:
        """Make a call, its arguments by position with defaults filled in."""
        ...


F = TypeVar("F", bound=Forwarder)


def forwards(engine: type[F]) -> type[F]:
    """Give a class the calls that it does not write itself: each becomes one of `forward`."""
    for name, signature in CALLS.items():
        if name not in vars(engine):
            setattr(engine, name, _forwarding(name, signature))
    return engine


def _forwarding(name: str, signature: inspect.Signature) -> Callable[..., Any]:
    def call(self: Forwarder, *args: Any, **named: Any) -> Any:
        bound = signature.bind(self, *args, **named)
        bound.apply_defaults()
        return self.forward(name, bound.args[1:])

    call.__name__ = name
    return call
