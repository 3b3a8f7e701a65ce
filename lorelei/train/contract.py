"""The TrainEngine contract: what updates adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from lorelei.lora.state import AdapterSnapshot, AdapterState
from lorelei.types import (
    AdamHyper,
    AdapterSpec,
    Batch,
    ItemOutputs,
    LossSpec,
    OptimStats,
    Policy,
    TrainOutputs,
)


class EngineFailed(RuntimeError):
    """A worker crashed, timed out or raised an internal error, not caused by its input.

    Or the engine is closed.
    """


class WorkersLost(EngineFailed):
    """A worker crashed or timed out, and all were stopped: new ones may succeed."""


class TrainEngine(Protocol):
    """One frozen base model and the adapters trained on it.

    Calls are synchronous and come from one thread at a time. Unknown adapter names raise
    KeyError naming the adapters there are.
    """

    def add_adapter(self, name: str, spec: AdapterSpec, seed: int = 0) -> None:
        """Create an adapter: A kaiming-uniform from `seed`, B zero, fresh optimizer.

        Raises ValueError when a target matches nothing or the name is taken.
        """
        ...

    def drop_adapter(self, name: str) -> None:
        """Forget an adapter and its optimizer state."""
        ...

    def hold(self, policy: Policy, state: AdapterState) -> None:
        """Keep a frozen adapter for `logprobs`, a reference or a teacher, until `release`.

        Replaces the one of that name. Raises ValueError for CURRENT, BASE and an adapter that
        does not fit the model.
        """
        ...

    def release(self, policy: Policy) -> None:
        """Forget what `hold` keeps under a name."""
        ...

    def logprobs(self, batch: Batch, policy: Policy) -> ItemOutputs:
        """Log-probabilities of every item, without gradients.

        policy: CURRENT for each segment's own adapter, BASE, or a name that is held.
        """
        ...

    def forward_backward(self, batch: Batch, losses: Mapping[str, LossSpec]) -> TrainOutputs:
        """Add the gradient of each adapter's loss to its gradient buffers.

        Called again before `optim_step`, gradients add up. When it raises, no gradient of any
        adapter in the batch is left.
        """
        ...

    def optim_step(self, hyper: Mapping[str, AdamHyper]) -> Mapping[str, OptimStats]:
        """Clip, step AdamW and clear the gradients of the named adapters, and of no other.

        Raises ValueError when one of them has no gradients, or infinite ones; then none of them
        has stepped, and their gradients are dropped.
        """
        ...

    def adapter_state(self, name: str) -> AdapterState:
        """A copy of the adapter's tensors under PEFT names, on the CPU, full (unsharded)."""
        ...

    def snapshot(self, name: str) -> AdapterSnapshot:
        """A copy of everything needed to go on training this adapter, here or elsewhere."""
        ...

    def restore(self, name: str, snapshot: AdapterSnapshot) -> None:
        """Replace an existing adapter's tensors and optimizer state, and drop its gradients."""
        ...

    def offload(self) -> None:
        """Move the frozen base to the host's memory, until `onload`; the CPU gains nothing by it.

        Adapters and their optimizers stay, and can be read.
        """
        ...

    def onload(self) -> None:
        """Undo `offload`."""
        ...

    def close(self) -> None:
        """Stop worker processes and free memory. Idempotent."""
        ...


# the calls that change adapters, which their first argument names; see remote.restarting
CHANGES = frozenset({"add_adapter", "drop_adapter", "forward_backward", "optim_step", "restore"})
