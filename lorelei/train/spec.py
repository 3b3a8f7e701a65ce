"""Which engine a worker process builds: everything it needs to know, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchonSpec:
    """An ArchonEngine as one of several data-parallel ranks."""

    model: str  # folder of the base model
    dtype: str  # a name in model.backend.DTYPES
    max_tokens_per_mb: int
    recompute: bool


EngineSpec = ArchonSpec
