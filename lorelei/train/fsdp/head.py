"""From hidden states to logits, as the architecture does it: softcaps and scales included.

Shapes: C a chunk of items, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from lorelei.lora.linear import ModelRoute
from lorelei.model.linear import FrozenLinear, FusedInput
from lorelei.train.fsdp.binding import Binding
from lorelei.train.fsdp.linear import HostedLinear


class HeadRoute:
    """Implements Route for the head alone, by the model's own last lines."""

    def __init__(self, lm: PreTrainedModel, binding: Binding, route: ModelRoute) -> None:
        self._lm, self._binding, self._route = lm, binding, route

    def __call__(
        self, layer: FrozenLinear, x_TD: Tensor, fused_input: FusedInput | None = None
    ) -> Tensor:
        assert fused_input is None
        with self._binding.use(self._route):
            return _logits(self._lm, x_TD)

    def take(self, index: Tensor) -> HeadRoute:
        return HeadRoute(self._lm, self._binding, self._route.take(index))


def is_plain(lm: PreTrainedModel, head: HostedLinear) -> bool:
    """Whether the logits are a product of hidden states with a matrix, and nothing else."""
    name = next((name for name, child in lm.named_children() if child is head), None)
    if name is None or head.bias is not None:
        return False
    product = torch.randn(1, 2, 4)
    hidden = torch.zeros(2, head.in_features)
    return torch.equal(_logits(lm, hidden, **{name: lambda x: product}), product[0])


def _logits(lm: PreTrainedModel, hidden_CD: Tensor, **replaced: Any) -> Tensor:
    """[C, V]: the model's forward without its blocks."""
    hidden: Any = hidden_CD[None]  # transformers names a legacy class of tensors
    found = MoeModelOutputWithPast(last_hidden_state=hidden)
    parts = {lm.base_model_prefix: lambda *args, **kwargs: found, **replaced}
    return type(lm).forward(_Replaced(lm, parts), use_cache=False).logits[0]


class _Replaced:
    """A model some of whose attributes are replaced: `forward` of its class then runs on those."""

    def __init__(self, lm: nn.Module, parts: dict[str, Any]) -> None:
        self._lm, self._parts = lm, parts

    def __getattr__(self, name: str) -> Any:
        return self._parts[name] if name in self._parts else getattr(self._lm, name)
