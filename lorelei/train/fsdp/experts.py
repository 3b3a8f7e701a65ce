"""The experts of a mixture, one by one, so that each can have adapters of its own.

transformers keeps a layer's experts as one tensor; checkpoints and adapters name each of them.
Shapes: T tokens, D hidden, F intermediate, k experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorelei.parallel.collectives import spread, summed
from lorelei.parallel.mesh import ALONE, Axis
from lorelei.train.fsdp.binding import Binding
from lorelei.train.fsdp.linear import Cut, HostedLinear


def is_experts(module: nn.Module) -> bool:
    """Whether it is the usual stack: gate_up_proj [E, 2F, D], down_proj [E, D, F], no biases."""
    held = dict(module.named_parameters(recurse=False))
    if held.keys() != {"gate_up_proj", "down_proj"} or not hasattr(module, "act_fn"):
        return False
    gate_up, down = held["gate_up_proj"], held["down_proj"]
    fits = gate_up.dim() == down.dim() == 3 and gate_up.shape[1] == 2 * down.shape[2]
    return fits and gate_up.shape[2] == down.shape[1]


class HostedExperts(nn.ModuleList):
    """Stands where transformers had a stack of experts; module i is expert i."""

    def __init__(
        self, name: str, replaced: Any, cut_up: bool, axis: Axis, binding: Binding
    ) -> None:
        """cut_up: every process has a part of every expert, not all of it."""
        experts, width, hidden = replaced.gate_up_proj.shape
        styles = ("inner_colwise", "inner_rowwise") if cut_up else ("replicated",) * 2
        inner, dtype = width // 2, replaced.gate_up_proj.dtype
        sizes = {
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }
        like = {
            key: nn.Linear(*size, bias=False, device="meta", dtype=dtype)
            for key, size in sizes.items()
        }
        cuts = {
            key: Cut.of(styles[key == "down_proj"], axis, linear.out_features, linear.in_features)
            for key, linear in like.items()
        }
        super().__init__(
            nn.ModuleDict(
                {
                    key: HostedLinear(f"{name}.{expert}.{key}", like[key], cuts[key], binding)
                    for key in like
                }
            )
            for expert in range(experts)
        )
        # wrapped: a module would become one of the experts
        self._act: Callable[[Tensor], Tensor] = partial(replaced.act_fn)
        self._axis = axis if cut_up else ALONE
        self._binding = binding

    def forward(self, x_TD: Tensor, chosen_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
        x_TD, weights_Tk = spread(x_TD, self._axis), spread(weights_Tk, self._axis)
        out_TD = torch.zeros_like(x_TD)
        route = self._binding.route
        for number, expert in enumerate(cast(Iterable[nn.ModuleDict], self)):
            tokens, slot = (chosen_Tk == number).nonzero(as_tuple=True)  # ascending: see take()
            if len(tokens) == 0 and not expert["down_proj"].weight.requires_grad:
                continue
            with self._binding.use(route.take(tokens)):
                x = x_TD[tokens]
                y = expert["down_proj"](self._act(expert["gate_proj"](x)) * expert["up_proj"](x))
            y = y * weights_Tk[tokens, slot, None]
            out_TD = out_TD.index_add(0, tokens, y.to(out_TD.dtype))
        return summed(out_TD, self._axis)
