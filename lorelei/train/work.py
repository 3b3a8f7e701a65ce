"""What a train engine is asked to do for one adapter, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from lorelei.types import (
    AdamHyper,
    Batch,
    Floats,
    ItemOutputs,
    Items,
    LossSpec,
    OptimStats,
    Policy,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One batch of one adapter with its loss, closed by an optimizer step or not."""

    batch: Batch
    loss: LossSpec
    step: AdamHyper | None  # None: the gradients wait for those of a later round


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One adapter's next piece of training."""

    adapter: str
    rounds: tuple[Round, ...]
    # {stream: policy}: log-probabilities that the losses read, taken before the first update
    policies: Mapping[str, Policy] = field(default_factory=dict[str, Policy])
    # the stream `advantage` of all rounds, where it follows from those of the policies
    advantages: Callable[[Sequence[Items]], Sequence[Floats]] | None = None
    publish: bool = True  # whether inference engines get the adapter as it is then
    last: bool = False  # whether the job has no work after it

    @property
    def steps(self) -> int:
        """Optimizer steps in it."""
        return sum(one.step is not None for one in self.rounds)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundResult:
    """What the engine said of one round."""

    outputs: ItemOutputs  # of the round's items, before its optimizer step
    metrics: Mapping[str, float]  # the loss and what it reports, weighted sums over items
    step: OptimStats | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of a Work."""

    work: Work
    rounds: tuple[RoundResult, ...]
    seconds: float  # of the whole pass, shared with the other adapters of it
    error: ValueError | None = None  # why there is no more of it; the adapter is as it was before

    @property
    def adapter(self) -> str:
        return self.work.adapter
