"""This rank's coordinates in Megatron's parallel groups, and the groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core import parallel_state as state

from lorelei.parallel.mesh import Axis
from lorelei.parallel.ranks import Ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronMesh:
    """The axes that a model and its adapters are split or repeated over."""

    tensor: Axis
    pipeline: Axis
    data: Axis  # ranks that get different shares of a batch
    context: Axis  # ranks that get parts of the same rows
    replicas: Axis  # data x context: they hold the same tensors
    expert: Axis
    expert_tensor: Axis
    expert_replicas: Axis  # they hold the same experts
    sequence_parallel: bool
    world: Ranks

    @classmethod
    def current(cls, sequence_parallel: bool, world: Ranks) -> MegatronMesh:
        """Of Megatron's global state, once it is initialised."""

        def axis(group: Any) -> Axis:
            return Axis(size=group.size(), rank=group.rank(), group=group)

        return cls(
            tensor=axis(state.get_tensor_model_parallel_group()),
            pipeline=axis(state.get_pipeline_model_parallel_group()),
            data=axis(state.get_data_parallel_group()),
            context=axis(state.get_context_parallel_group()),
            replicas=axis(state.get_data_parallel_group(with_context_parallel=True)),
            expert=axis(state.get_expert_model_parallel_group()),
            expert_tensor=axis(state.get_expert_tensor_parallel_group()),
            expert_replicas=axis(state.get_expert_data_parallel_group()),
            sequence_parallel=sequence_parallel,
            world=world,
        )

    @property
    def last_stage(self) -> bool:
        return self.pipeline.rank == self.pipeline.size - 1

    @property
    def reports_outputs(self) -> bool:
        """Whether this rank's outputs are counted: of the ranks with the same items, one's are."""
        return self.last_stage and self.tensor.rank == 0 and self.context.rank == 0

    @property
    def multiple(self) -> int:
        """What the length of a row must be a multiple of."""
        return self.context.size * (self.tensor.size if self.sequence_parallel else 1)

    @property
    def experts_span_ranks(self) -> bool:
        """Whether ranks with other rows take part in a layer."""
        return self.expert.size > 1 or self.expert_tensor.size > 1

    def splitting(self, expert: bool) -> Axis:
        """The axis that a layer's weights are split over."""
        return self.expert_tensor if expert else self.tensor

    def repeating(self, expert: bool) -> Axis:
        """The axis that a layer's weights are repeated over."""
        return self.expert_replicas if expert else self.replicas
