"""The train engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from lorelei.config.errors import FieldError
from lorelei.config.section import Section, tagged


class _Batches(Section):
    """How any of our own engines goes through a batch."""

    max_tokens_per_mb: int = Field(
        default=1024, ge=1, description="Tokens of one micro-batch; a longer sequence stands alone."
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations: less memory, about a third more time."
    )


class ArchonTrain(_Batches):
    """The torch-native train engine."""

    kind: Literal["archon"] = Field(default="archon", description="Which train engine.")
    workers: int = Field(default=1, ge=1, description="Data-parallel processes.")


class FsdpTrain(_Batches):
    """Any causal language model of transformers, its base sharded by PyTorch's FSDP2."""

    refused: ClassVar[Mapping[str, str]] = {
        "workers": "follows from data_parallel * tensor_parallel * sequence_parallel; set those"
    }

    kind: Literal["fsdp"] = Field(default="fsdp", description="Which train engine.")
    data_parallel: int = Field(
        default=1, ge=1, description="Shares of a batch; each holds a part of every frozen matrix."
    )
    tensor_parallel: int = Field(
        default=1, ge=1, description="Processes that multiply with parts of each matrix."
    )
    sequence_parallel: int = Field(
        default=1,
        ge=1,
        description="Processes that each hold a part of the tokens of a micro-batch, for long "
        "sequences (Ulysses).",
    )
    cpu_offload: bool = Field(
        default=False,
        description="Keep the frozen base in the CPU's memory and copy a layer to the accelerator "
        "when it is needed.",
    )

    @property
    def workers(self) -> int:
        """Processes in all."""
        return self.data_parallel * self.tensor_parallel * self.sequence_parallel

    @model_validator(mode="after")
    def _one_way_to_split_heads(self) -> FsdpTrain:
        if self.tensor_parallel > 1 and self.sequence_parallel > 1:
            raise FieldError(
                "sequence_parallel",
                f"{self.sequence_parallel} together with tensor_parallel: {self.tensor_parallel}; "
                "both share out the heads of the attention: set one of them to 1",
            )
        return self


TrainConfig = Annotated[
    ArchonTrain | FsdpTrain,
    Field(discriminator="kind"),
    tagged(ArchonTrain, FsdpTrain, default="archon"),
]
