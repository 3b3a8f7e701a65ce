"""The train engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from lorelei.config.errors import FieldError
from lorelei.config.parallel import ParallelSizes
from lorelei.config.section import Section, tagged


class TrainSection(Section):
    """What every train engine has."""

    max_tokens_per_mb: int = Field(
        default=1024, ge=1, description="Tokens of one micro-batch; a longer sequence stands alone."
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations: less memory, about a third more time."
    )


class ArchonTrain(TrainSection):
    """The torch-native train engine."""

    kind: Literal["archon"] = Field(default="archon", description="Which train engine.")
    workers: int = Field(default=1, ge=1, description="Data-parallel processes.")

    @property
    def sizes(self) -> ParallelSizes:
        return ParallelSizes(data=self.workers)


class FsdpTrain(TrainSection):
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

    @property
    def sizes(self) -> ParallelSizes:
        return ParallelSizes(
            data=self.data_parallel, tensor=self.tensor_parallel, context=self.sequence_parallel
        )

    @model_validator(mode="after")
    def _one_way_to_split_heads(self) -> FsdpTrain:
        if self.tensor_parallel > 1 and self.sequence_parallel > 1:
            raise FieldError(
                "sequence_parallel",
                f"{self.sequence_parallel} together with tensor_parallel: {self.tensor_parallel}; "
                "both share out the heads of the attention: set one of them to 1",
            )
        return self


class MegatronTrain(TrainSection):
    """Megatron-Core and Megatron-Bridge in an interpreter of their own; `make megatron`.

    Runs data_parallel x tensor_parallel x context_parallel processes for each of pipeline_parallel
    stages. Experts are spread over those of their stage, which expert_parallel x
    expert_tensor_parallel divides.
    """

    kind: Literal["megatron"] = Field(description="Which train engine.")
    data_parallel: int = Field(default=1, ge=1, description="Copies of the model.")
    tensor_parallel: int = Field(default=1, ge=1, description="Processes a layer is split over.")
    pipeline_parallel: int = Field(default=1, ge=1, description="Stages of layers.")
    context_parallel: int = Field(
        default=1, ge=1, description="Processes a row of tokens is split over, for long sequences."
    )
    expert_parallel: int = Field(default=1, ge=1, description="Processes experts are dealt to.")
    expert_tensor_parallel: int = Field(
        default=1, ge=1, description="Processes an expert is split over."
    )
    sequence_parallel: bool = Field(
        default=False,
        description="Split tokens over the tensor-parallel processes between layers; a mixture "
        "of experts with tensor_parallel needs it.",
    )
    distributed_optimizer: bool = Field(
        default=False, description="Each copy keeps a part of the optimizer's moments."
    )

    @property
    def workers(self) -> int:
        """How many processes there are."""
        return self._stage * self.pipeline_parallel

    @property
    def _stage(self) -> int:
        return self.data_parallel * self.tensor_parallel * self.context_parallel

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
    def _fits_together(self) -> MegatronTrain:
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise FieldError(
                "sequence_parallel",
                "true needs tensor_parallel above 1, whose processes share the tokens; raise it, "
                "or leave sequence_parallel out",
            )
        experts = self.expert_parallel * self.expert_tensor_parallel
        if self._stage % experts:
            raise FieldError(
                "expert_parallel",
                f"{self.expert_parallel} x expert_tensor_parallel {self.expert_tensor_parallel} "
                f"does not divide the {self._stage} processes of a stage (data_parallel x "
                "tensor_parallel x context_parallel); change one of them",
            )
        return self


TrainConfig = Annotated[
    ArchonTrain | FsdpTrain | MegatronTrain,
    Field(discriminator="kind"),
    tagged(ArchonTrain, FsdpTrain, MegatronTrain, default="archon"),
]
