"""What is used of torch's autograd, with the types that torch does not declare."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    T = TypeVar("T")

    class Function(torch.autograd.Function):
        @classmethod
        def apply(cls, *args: Any) -> Any: ...

    def checkpoint(
        function: Callable[..., T],
        *args: Any,
        use_reentrant: bool,
        preserve_rng_state: bool = True,
    ) -> T: ...
else:
    from torch.utils.checkpoint import checkpoint

    Function = torch.autograd.Function

__all__ = ["Function", "checkpoint"]
