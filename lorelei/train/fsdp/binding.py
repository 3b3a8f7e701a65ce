"""The route of adapters, bound to the layers of a foreign module tree for one pass.

transformers' modules pass no route from one to the other, so each of our layers in them asks the
model's Binding, which holds the route of the pass that runs. A recomputed block enters it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorelei.lora.linear import ModelRoute


class Binding:
    """Belongs to one model, whose layers share it."""

    def __init__(self) -> None:
        self._route: ModelRoute | None = None

    @property
    def route(self) -> ModelRoute:
        """Of the pass that runs."""
        assert self._route is not None, "a layer ran outside of a pass"
        return self._route

    @contextmanager
    def use(self, route: ModelRoute) -> Iterator[None]:
        """The layers follow `route` inside."""
        before, self._route = self._route, route
        try:
            yield
        finally:
            self._route = before


def recomputed(block: nn.Module, binding: Binding) -> None:
    """Make a block keep only its input, and compute the rest again in the backward pass."""
    forward: Callable[..., Any] = block.forward

    @wraps(forward)
    def again(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not x.requires_grad:
            return forward(x, *args, **kwargs)
        route = binding.route

        def bound(x: Tensor) -> Any:
            with binding.use(route):
                return forward(x, *args, **kwargs)

        # dropout masks come from seeds of their own: no RNG state to keep
        return checkpoint(bound, x, use_reentrant=False, preserve_rng_state=False)

    block.forward = again
