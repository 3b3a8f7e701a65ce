"""One decoding step through all layers in one call; see `decode_step` in kernels.c.

With few rows the kernels of a layer are over so soon that starting them one by one, and waking the
other threads for each, counts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lorelei.inference.embedded.route import PublishedRoute
from lorelei.lora.bank import MergedRoute
from lorelei.model.backend import LowRank
from lorelei.model.decoder import Decoder
from lorelei.model.kernels import fused
from lorelei.model.kernels.fused import Blocks, StepCache
from lorelei.model.mlp import Mlp


def fits(decoder: Decoder) -> bool:
    """Whether the kernel knows everything that this decoder has."""
    return fused.fuses(decoder.embedding) and all(
        isinstance(layer.mlp, Mlp)
        and all(x.bias is None for x in (layer.out, layer.mlp.gate_up, layer.mlp.down))
        for layer in decoder.layers
    )


def blocks(decoder: Decoder, route: PublishedRoute | MergedRoute) -> Blocks:
    """What the kernel reads of a decoder that `fits`; both must outlive it."""
    spans = route.spans if isinstance(route, PublishedRoute) else ()
    weights: list[list[int]] = []
    deltas: list[list[list[tuple[int, int, int]]]] = []
    for layer in decoder.layers:
        assert isinstance(layer.mlp, Mlp), "see fits"
        linears = (layer.qkv, layer.out, layer.mlp.gate_up, layer.mlp.down)
        norms = (layer.input_norm, layer.q_norm, layer.k_norm, layer.mlp_norm)
        tensors = [
            *(None if norm is None else norm.weight for norm in norms),
            *(route.weight(linear).held for linear in linears),
            layer.qkv.bias,
        ]
        weights.append([0 if tensor is None else tensor.data_ptr() for tensor in tensors])
        deltas.append([[_delta(span.layers.get(linear)) for span in spans] for linear in linears])
    table_L4S3 = torch.tensor(deltas, dtype=torch.int64)
    rank = int(table_L4S3[..., 2].max()) if spans else 0
    bounds = torch.tensor([(span.start, span.stop) for span in spans], dtype=torch.int64)
    return Blocks(torch.tensor(weights), table_L4S3, bounds, rank)


def whole_step(
    decoder: Decoder, blocks: Blocks, tokens_B: Tensor, positions_B: Tensor, cache: StepCache
) -> Tensor:
    """Hidden states [B, D] after the last norm, as `Decoder` gives them."""
    hidden_BD = F.embedding(tokens_B, decoder.embedding)
    config = decoder.config
    fused.decode_step(
        *(hidden_BD, blocks, decoder.rotary.at(positions_B), cache),
        *(config.norm_eps, config.heads, config.intermediate),
    )
    return decoder.norm(hidden_BD)


def _delta(low: LowRank | None) -> tuple[int, int, int]:
    return (0, 0, 0) if low is None else (low.a_DR.data_ptr(), low.b.data_ptr(), low.a_DR.shape[1])
