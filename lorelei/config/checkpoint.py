"""When adapters are written to the run folder, and how many checkpoints stay."""

from __future__ import annotations

from pydantic import Field

from lorelei.config.section import Section


class CheckpointConfig(Section):
    """Checkpoints of adapters; the base model is never written."""

    every: int = Field(default=1, ge=1, description="Steps between checkpoints.")
    keep: int = Field(
        default=2, ge=2, description="Checkpoints kept; at least 2, so that one damaged is no loss."
    )
