"""How many numbers an adapter, or full weights, make each part of a run hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from lorelei.lora.targets import Shape
from lorelei.model.config import ModelSizes

# projections of one input are one layer, see model.linear
_FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSize:
    """Numbers of elements."""

    trained: int
    published: int  # of one version, in fp32
    serving: int  # of one version, in the base model's dtype: laid out for decoding
    merged: int  # of the layers that a merged version replaces
    lifted: int  # x A, kept for each token while training, summed over all layers


def full_size(model: ModelSizes, base: int) -> AdapterSize:
    """Of full weights: nothing is merged, and gradients go through the trained copy."""
    serving = base + tied_head(model)
    return AdapterSize(trained=base, published=0, serving=serving, merged=0, lifted=0)


def lora_size(
    model: ModelSizes,
    shapes: Mapping[str, Shape],
    modules: Sequence[str],
    rank: int,
    tied: Mapping[str, str] | None = None,
) -> AdapterSize:
    """Of LoRA matrices on these modules. tied: {module: what its A is called}."""
    layers: dict[str, int] = {}  # adapted layer -> its adapted modules
    for name in modules:
        layers[_layer(name)] = layers.get(_layer(name), 0) + 1
    serving = merged = 0
    for name, (out, wide) in shapes.items():
        if (parts := layers.get(_layer(name), 0)) > 0:
            merged += out * wide
            serving += rank * parts * out  # B of all parts, one block each on the diagonal
    tied = tied or {}
    read = {tied.get(name, name): shapes[name][1] for name in modules}  # an A that is shared: once
    trained = rank * (sum(read.values()) + sum(shapes[name][0] for name in modules))
    inputs = sum(rank * shapes[name][1] for name in modules)
    return AdapterSize(
        trained=trained,
        published=trained,
        serving=serving + inputs,
        merged=merged,
        lifted=round(sum(rank * _share(model, name) for name in modules)),
    )


def tied_head(model: ModelSizes) -> int:
    """Parameters of the embedding where lm_head multiplies with it, else none."""
    return model.vocab * model.hidden if model.tied_embeddings else 0


def _layer(module: str) -> str:
    parent, _, leaf = module.rpartition(".")
    return f"{parent}.{_FUSED.get(leaf, leaf)}"


def _share(model: ModelSizes, module: str) -> Fraction:
    """Of the tokens that go through a module."""
    if model.moe is not None and ".experts." in module:
        return Fraction(model.moe.experts_per_token, model.moe.experts)
    return Fraction(1)
