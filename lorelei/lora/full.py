"""Full fine-tuning: a copy of the base model, every weight of which is trained.

It takes an adapter's place in the bank, so that LoRA's saving can be measured.
Shapes: T tokens, D inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from lorelei.lora.linear import ModelRoute
from lorelei.lora.state import AdapterState
from lorelei.model.autograd import Function
from lorelei.model.decoder import Decoder
from lorelei.model.linear import FrozenLinear, FusedInput, transformed
from lorelei.model.norm import RmsNorm
from lorelei.model.weights import named_tensors, rebuilt, unpack
from lorelei.types import FULL_WEIGHTS, AdapterSpec

M = TypeVar("M")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class FullWeights(Generic[M]):
    """The trained copy of a base model."""

    decoder: M
    named: Mapping[str, Tensor]  # the live tensors by the checkpoint's names, sorted
    route: ModelRoute  # every token through it
    spec: AdapterSpec = FULL_WEIGHTS

    def tensors(self) -> Mapping[str, Tensor]:
        return self.named


def trained_copy(base: Decoder, dtype: torch.dtype) -> FullWeights[Decoder]:
    """A copy that starts as the base, in the plain layout: it is written at every step."""
    decoder = rebuilt(base, dict(named_tensors(base)), dtype)
    unpack(decoder)
    # the parts of a fused layer are trained as views of it
    named = {name: tensor.requires_grad_() for name, tensor in named_tensors(decoder)}
    layers: dict[FrozenLinear, tuple[Tensor, ...]] = {}
    for layer in decoder.linears():
        names = [f"{part.name}.weight" for part in layer.parts]
        if layer.bias is not None:
            names += [f"{part.name}.bias" for part in layer.parts]
        layers[layer] = tuple(named[name] for name in names if name in named)
    if decoder.tied:
        layers[decoder.head] = (decoder.embedding,)
    return FullWeights(decoder=decoder, named=dict(sorted(named.items())), route=FullRoute(layers))


class FullRoute:
    """Every token through the trained model; with `FullWeights.decoder` only."""

    def __init__(self, layers: Mapping[FrozenLinear, tuple[Tensor, ...]]) -> None:
        """layers: the weight of each part and the bias of each part."""
        self._layers = layers

    def __call__(
        self, layer: FrozenLinear, x_TD: Tensor, fused_input: FusedInput | None = None
    ) -> Tensor:
        trained = self._layers[layer]
        # norms outside of a linear layer, the embedding and routers are autograd's
        norm = (fused_input.weight,) if isinstance(fused_input, RmsNorm) else ()
        return _FullLinear.apply(x_TD, layer, fused_input, *trained, *norm)

    def adapts(self, layer: FrozenLinear) -> bool:
        """Whether the layer is trained."""
        return True

    def take(self, index: Tensor) -> FullRoute:
        return self


class _FullLinear(Function):
    """Keeps x before its fused input."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layer: FrozenLinear, fused_input: FusedInput | None, *trained: Tensor
    ) -> Tensor:
        ctx.layer, ctx.fused_input = layer, fused_input
        # weights are saved through the layer: the optimizer writes them only between passes
        ctx.save_for_backward(x)
        return layer.product(transformed(x, fused_input))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (dy_TO,) = ctx.saved_tensors, grads
        layer, fused_input = ctx.layer, ctx.fused_input
        x_TD = transformed(x, fused_input)
        d_weight_OD = dy_TO.T @ x_TD
        found = [d_weight_OD[part.start : part.stop] for part in layer.parts]
        if layer.bias is not None:
            d_bias_O = dy_TO.sum(0)
            found += [d_bias_O[part.start : part.stop] for part in layer.parts]
        dx_TD = layer.weight.transposed_product(dy_TO)
        if isinstance(fused_input, RmsNorm):
            found.append(fused_input.weight_grad(x, dx_TD))
        dx = dx_TD if fused_input is None else fused_input.backward(x, dx_TD)
        return dx, None, None, *found


def serving_copy(base: Decoder, name: str, state: AdapterState) -> Decoder:
    """A private decoder on a copy of full weights, laid out for inference.

    Raises ValueError when the weights are not those of a model like `base`, or the copy, which is
    in its dtype, does not hold what was sent.
    """
    decoder = rebuilt(base, state.tensors, base.dtype)
    extra = set(state.tensors)
    for tensor_name, tensor in named_tensors(decoder):
        extra.discard(tensor_name)
        sent = state.tensors[tensor_name]
        if sent.dtype != tensor.dtype or not torch.equal(tensor.to("cpu"), sent):
            raise ValueError(
                f"adapter {name!r}: {tensor_name} is {sent.dtype}, the engine holds "
                f"{tensor.dtype}; full weights need a run with dtype: float32"
            )
    if extra:
        raise ValueError(
            f"adapter {name!r}: tensor {min(extra)!r} belongs to no layer of the model"
        )
    return decoder
