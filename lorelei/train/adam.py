"""One AdamW for one adapter: clip, step, clear, and its state under the adapter's names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorelei.types import AdamHyper, OptimStats


class AdapterOptimizer:
    """torch's AdamW over the tensors of one adapter; moments in the tensors' dtype."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)
        # fused: no temporary copies of the tensors, which full weights would feel
        self._adam = torch.optim.AdamW(self._tensors.values(), lr=0.0, fused=True)
        self.step_count = 0

    def grad_norm(self) -> Tensor | None:
        """The norm of all gradients together; None when there are none."""
        if all(t.grad is None for t in self._tensors.values()):
            return None
        for tensor in self._tensors.values():
            if tensor.grad is None:  # an expert that no token reached: its moments decay
                tensor.grad = torch.zeros_like(tensor)
        gradients = [t.grad for t in self._tensors.values() if t.grad is not None]
        return torch.nn.utils.get_total_norm(gradients, foreach=True)

    def step(self, hyper: AdamHyper, norm: Tensor) -> OptimStats:
        """Clip from `norm`, that of the gradients, to hyper.max_grad_norm; step; clear."""
        if hyper.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(
                self._tensors.values(), hyper.max_grad_norm, norm, foreach=True
            )
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
        both: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        for name, tensor in self._tensors.items():
            held = self._adam.state.get(tensor, {})
            for found, key in zip(both, ("exp_avg", "exp_avg_sq"), strict=True):
                moment = held[key] if held else torch.zeros_like(tensor)
                found[name] = moment.detach().to("cpu", copy=True)
        return both

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
                "exp_avg": exp_avg[name].to(tensor.device, tensor.dtype, copy=True),
                "exp_avg_sq": exp_avg_sq[name].to(tensor.device, tensor.dtype, copy=True),
            }
