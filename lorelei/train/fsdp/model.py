"""HostedModel: a causal language model of transformers, sharded, as a base for our adapters.

Shapes: T tokens, t of this process, I items, i of this process, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

from lorelei.lora.linear import ModelRoute
from lorelei.model.backend import HOST, move
from lorelei.model.head import routed_target_logprobs, target_logprobs
from lorelei.model.linear import FrozenLinear
from lorelei.parallel.mesh import Mesh
from lorelei.train.fsdp.attention import Attend
from lorelei.train.fsdp.binding import recomputed
from lorelei.train.fsdp.head import HeadRoute, is_plain
from lorelei.train.fsdp.skeleton import build_skeleton
from lorelei.train.fsdp.weights import load_weights, stored_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What a model is read from, and how it is held."""

    folder: Path
    dtype: torch.dtype
    device: torch.device
    recompute: bool
    cpu_offload: bool

    @property
    def home(self) -> torch.device:
        """Where parameters are between passes."""
        return HOST if self.cpu_offload else self.device


class HostedModel(nn.Module):
    """Implements lora.bank.Base. Every process of the mesh makes and calls it alike."""

    def __init__(self, source: Source, mesh: Mesh, trained: bool = False) -> None:
        """Read this process's part of the checkpoint. trained: all of it gets gradients.

        Raises UnsupportedModel or CheckpointError with one clear line.
        """
        super().__init__()
        skeleton = build_skeleton(source.folder, source.dtype, mesh.tensor)
        self.lm, self._skeleton, self._source, self.mesh = skeleton.lm, skeleton, source, mesh
        self.lm.requires_grad_(trained)
        held = stored_parameters(self.lm)
        if source.recompute:
            for block in skeleton.blocks:
                recomputed(block, skeleton.binding)
        if mesh.shards is not None:
            self._shard(_policy(source))
        load_weights(self.lm, held, source.folder, source.home, source.device, mesh.shard)
        # the live parameters by the checkpoint's names, one with several names once; FSDP puts
        # other tensors into the modules while they are gathered
        self.named = dict(sorted((stored.names[0], stored.parameter) for stored in held))
        self.lm.get_input_embeddings().register_forward_hook(_differentiable)
        self._plain_head = is_plain(self.lm, skeleton.head)

    def _shard(self, offload: OffloadPolicy) -> None:
        for block in self._skeleton.blocks:
            fully_shard(block, mesh=self.mesh.shards, offload_policy=offload)
        # embedding and head stay gathered between the forward and the backward pass
        fully_shard(self, mesh=self.mesh.shards, offload_policy=offload)
        for module in (*self._skeleton.blocks, self):
            assert isinstance(module, FSDPModule)
            # a loss is a sum, not a mean over processes; gloo has no other reduction
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)

    def trained_copy(self, dtype: torch.dtype) -> HostedModel:
        """Another model from the same checkpoint, every weight of which gets gradients."""
        return HostedModel(replace(self._source, dtype=dtype), self.mesh, trained=True)

    @property
    def architecture(self) -> str:
        return type(self.lm).__name__

    @property
    def dtype(self) -> torch.dtype:
        return self._source.dtype

    @property
    def device(self) -> torch.device:
        return self._source.device

    def linears(self) -> list[FrozenLinear]:
        """Every linear layer that an adapter may target."""
        return [module.layer for module in self._skeleton.hosted]

    def forward(
        self,
        tokens_t: Tensor,
        positions_t: Tensor,
        route: ModelRoute,
        attend: Attend,
        items: tuple[Tensor, Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies [i].

        route: of all t tokens. items: source among the t tokens, ascending or not; target;
        temperature; [i] each.
        """
        source_i, target_i, temperature_i = items
        if not len(source_i):  # every pass goes through the head too: others wait for it
            first = (source_i.new_zeros(1), target_i.new_zeros(1), temperature_i.new_ones(1))
            logprobs, entropy = self.forward(tokens_t, positions_t, route, attend, first)
            return logprobs[:0].clone(), entropy[:0].clone()  # FSDP wants no views
        with self._skeleton.binding.use(route):
            hidden_tD = self.lm.base_model(
                input_ids=tokens_t[None],
                position_ids=positions_t[None],
                use_cache=False,
                attend=attend,
            ).last_hidden_state[0]
        hidden_iD, layer = hidden_tD[source_i], self._skeleton.head.layer
        if self._plain_head and not route.adapts(layer):
            return target_logprobs(hidden_iD, layer, target_i, temperature_i)
        head = HeadRoute(self.lm, self._skeleton.binding, route.take(source_i))
        return routed_target_logprobs(hidden_iD, layer, head, target_i, temperature_i)

    def settle(self) -> None:
        """Give back what the last pass left gathered: it may be old, or not be needed."""
        if isinstance(self, FSDPModule):
            self.reshard()

    def offload(self) -> None:
        """Move the frozen base to the host's memory."""
        if not self._source.cpu_offload:
            move(self, HOST)

    def onload(self) -> None:
        """Undo `offload`."""
        if not self._source.cpu_offload:
            move(self, self._source.device)


def _policy(source: Source) -> OffloadPolicy:
    if not source.cpu_offload:
        return OffloadPolicy()
    # pinned memory is for copies to an accelerator, and there is none without one
    return CPUOffloadPolicy(pin_memory=source.device.type != "cpu")


def _differentiable(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Every pass goes back through every block, whichever layers its adapters are on.

    Ranks whose micro-batches hold different adapters then gather the same blocks.
    """
    return output.requires_grad_() if torch.is_grad_enabled() else output
