"""A decoder's weights under the checkpoint's names, and a decoder made of such weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lorelei.model.decoder import Decoder
from lorelei.model.load import Checkpoint, build_decoder
from lorelei.model.mlp import Moe


def named_tensors(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Every weight once: a tied head is the embedding.

    They are the decoder's own, or views of them, but for matrices in a packed layout: these are
    copies, made when it is their turn.
    """
    yield "model.embed_tokens.weight", decoder.embedding
    for number, layer in enumerate(decoder.layers):
        at = f"model.layers.{number}"
        yield f"{at}.input_layernorm.weight", layer.input_norm.weight
        if layer.q_norm is not None and layer.k_norm is not None:
            yield f"{at}.self_attn.q_norm.weight", layer.q_norm.weight
            yield f"{at}.self_attn.k_norm.weight", layer.k_norm.weight
        yield f"{at}.post_attention_layernorm.weight", layer.mlp_norm.weight
        if isinstance(layer.mlp, Moe):
            yield f"{at}.mlp.gate.weight", layer.mlp.router
    yield "model.norm.weight", decoder.norm.weight
    for linear in decoder.linears():
        if linear is decoder.head and decoder.tied:
            continue
        dense_OD = linear.weight.dense()
        for part in linear.parts:
            yield f"{part.name}.weight", dense_OD[part.start : part.stop]
            if linear.bias is not None:
                yield f"{part.name}.bias", linear.bias[part.start : part.stop]


def rebuilt(base: Decoder, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Decoder:
    """A decoder like `base` on copies of these weights.

    Raises ValueError for one that is missing or of another shape.
    """
    checkpoint = Checkpoint(tensors, Path("full weights"), dtype, base.device)
    return build_decoder(base.config, checkpoint)


def unpack(decoder: Decoder) -> None:
    """Keep every matrix in the plain layout only, so that it can be written to."""
    for linear in decoder.linears():
        tied = linear is decoder.head and decoder.tied
        linear.weight.held = decoder.embedding if tied else linear.weight.dense()
