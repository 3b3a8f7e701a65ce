"""Which engine a worker process builds: everything it needs to know, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchonSpec:
    """An TrainEngine as one of several data-parallel ranks."""

    model: str  # folder of the base model
    dtype: str  # a name in model.backend.DTYPES
    max_tokens_per_mb: int
    recompute: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FsdpSpec:
    """An FsdpEngine as one of the ranks that hold a model together.

    Their number is a multiple of sequence_parallel * tensor_parallel; the quotient is the number
    of shares of a batch.
    """

    model: str  # folder of the base model
    dtype: str  # a name in model.backend.DTYPES
    max_tokens_per_mb: int
    recompute: bool
    tensor_parallel: int = 1
    sequence_parallel: int = 1
    cpu_offload: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronSpec:
    """A MegatronEngine as one of its ranks; what is left of the world is data-parallel."""

    model: str  # folder of the base model
    dtype: str  # a name in model.backend.DTYPES
    max_tokens_per_mb: int
    recompute: bool
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    context_parallel: int = 1
    expert_parallel: int = 1
    expert_tensor_parallel: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False


EngineSpec = ArchonSpec | FsdpSpec | MegatronSpec
