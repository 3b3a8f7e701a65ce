"""AdamW of one adapter: clip, step, clear, and its state under the adapter's names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lorelei.lora.sharded import part_like, whole
from lorelei.lora.state import copies
from lorelei.parallel.ranks import Ranks
from lorelei.types import AdamHyper, OptimStats


class AdapterOptimizer:
    """Implements adapter_engine.Optimizer by torch's AdamW; moments in the tensors' dtype.

    A tensor with several names, a tied A, is one: it counts once in the norm and steps once.
    """

    def __init__(self, tensors: Mapping[str, Tensor], ranks: Ranks | None = None) -> None:
        """ranks: all have the same tensors, and gradients to be summed."""
        self._tensors, self._ranks = dict(tensors), ranks or Ranks()
        self._own = list({id(tensor): tensor for tensor in tensors.values()}.values())
        # fused: no temporary copies of the tensors, which full weights would feel
        self._adam = torch.optim.AdamW(self._own, lr=0.0, fused=True)
        self.step_count = 0

    def grad_norm(self) -> Tensor | None:
        """Sum the gradients over the ranks. Returns their norm, None when there are none."""
        # FSDP has added up those of what it shards
        self._ranks.add_up_gradients(
            [t for t in self._tensors.values() if not isinstance(t, DTensor)]
        )
        if all(t.grad is None for t in self._own):
            return None
        for tensor in self._own:
            if tensor.grad is None:  # an expert that no token reached: its moments decay
                tensor.grad = torch.zeros_like(tensor)
        gradients = [t.grad for t in self._own if t.grad is not None]
        return whole(torch.nn.utils.get_total_norm(gradients, foreach=True))

    def step(self, hyper: AdamHyper, norm: Tensor) -> OptimStats:
        """Clip from `norm`, that of the gradients, to hyper.max_grad_norm; step; clear."""
        if hyper.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self._own, hyper.max_grad_norm, norm, foreach=True)
        self._adam.param_groups[0].update(
            lr=hyper.lr,
            betas=(hyper.beta1, hyper.beta2),
            eps=hyper.eps,
            weight_decay=hyper.weight_decay,
        )
        self._adam.step()
        self.step_count += 1
        self.clear()
        return OptimStats(grad_norm=norm.item(), step=self.step_count)

    def clear(self) -> None:
        """Drop all gradients."""
        self._adam.zero_grad(set_to_none=True)

    def moments(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Copies of (exp_avg, exp_avg_sq) by name; zeros before the first step."""
        return self._moment("exp_avg"), self._moment("exp_avg_sq")

    def _moment(self, key: str) -> dict[str, Tensor]:
        held: dict[int, Tensor] = {}
        for tensor in self._own:
            state = self._adam.state.get(tensor)
            held[id(tensor)] = (
                state[key] if state else torch.zeros(tensor.shape, dtype=tensor.dtype)
            )
        return copies({name: held[id(tensor)] for name, tensor in self._tensors.items()})

    def restore(
        self, exp_avg: Mapping[str, Tensor], exp_avg_sq: Mapping[str, Tensor], step: int
    ) -> None:
        """Replace the moments and the step count, and drop all gradients."""
        self.clear()
        self.step_count = step
        for name, tensor in self._tensors.items():
            if step == 0:
                self._adam.state.pop(tensor, None)
                continue
            self._adam.state[tensor] = {
                "step": torch.tensor(float(step), device=tensor.device),
                "exp_avg": part_like(exp_avg[name], tensor),
                "exp_avg_sq": part_like(exp_avg_sq[name], tensor),
            }
