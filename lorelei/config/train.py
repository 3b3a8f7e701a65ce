"""The train engine."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lorelei.config.section import Section


class ArchonTrain(Section):
    """The torch-native train engine."""

    kind: Literal["archon"] = Field(default="archon", description="Which train engine.")
    max_tokens_per_mb: int = Field(
        default=1024, ge=1, description="Tokens of one micro-batch; a longer sequence stands alone."
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations: less memory, about a third more time."
    )
    workers: int = Field(default=1, ge=1, description="Data-parallel processes.")


TrainConfig = ArchonTrain
