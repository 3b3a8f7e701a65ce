"""The train engine."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lorelei.config.errors import FieldError
from lorelei.config.parallel import ParallelSizes
from lorelei.config.section import Section, tagged


class _Train(Section):
    max_tokens_per_mb: int = Field(
        default=1024, ge=1, description="Tokens of one micro-batch; a longer sequence stands alone."
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations: less memory, about a third more time."
    )


class ArchonTrain(_Train):
    """The torch-native train engine."""

    kind: Literal["archon"] = Field(default="archon", description="Which train engine.")
    workers: int = Field(default=1, ge=1, description="Data-parallel processes.")

    @property
    def sizes(self) -> ParallelSizes:
        return ParallelSizes(data=self.workers)


class FsdpTrain(_Train):
    """PyTorch's FSDP2 over any causal language model of transformers."""

    kind: Literal["fsdp"] = Field(description="Which train engine.")
    data_parallel: int = Field(
        default=1, ge=1, description="Processes that share the base model and get batches each."
    )
    tensor_parallel: int = Field(default=1, ge=1, description="Processes that share each matrix.")
    sequence_parallel: int = Field(
        default=1, ge=1, description="Processes that share each sequence (Ulysses)."
    )

    @property
    def sizes(self) -> ParallelSizes:
        return ParallelSizes(
            data=self.data_parallel, tensor=self.tensor_parallel, context=self.sequence_parallel
        )


class MegatronTrain(_Train):
    """Megatron-Core; `make megatron` installs it."""

    kind: Literal["megatron"] = Field(description="Which train engine.")
    data_parallel: int = Field(default=1, ge=1, description="Processes that get batches each.")
    tensor_parallel: int = Field(default=1, ge=1, description="Processes that share each matrix.")
    pipeline_parallel: int = Field(default=1, ge=1, description="Stages of layers.")
    context_parallel: int = Field(default=1, ge=1, description="Processes that share a sequence.")
    expert_parallel: int = Field(default=1, ge=1, description="Processes that share the experts.")
    expert_tensor_parallel: int = Field(
        default=1, ge=1, description="Processes that share each expert's matrices."
    )

    @property
    def sizes(self) -> ParallelSizes:
        return ParallelSizes(
            data=self.data_parallel,
            tensor=self.tensor_parallel,
            pipeline=self.pipeline_parallel,
            context=self.context_parallel,
            expert=self.expert_parallel,
            expert_tensor=self.expert_tensor_parallel,
        )

    @model_validator(mode="after")
    def _sizes_fit(self) -> MegatronTrain:
        try:
            _ = self.sizes
        except ValueError as error:
            raise FieldError("expert_parallel", f"{self.expert_parallel}: {error}") from error
        return self


TrainConfig = Annotated[
    ArchonTrain | FsdpTrain | MegatronTrain,
    Field(discriminator="kind"),
    tagged(ArchonTrain, FsdpTrain, MegatronTrain, default="archon"),
]
