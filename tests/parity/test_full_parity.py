"""Full fine-tuning: the gradient of every weight against transformers' autograd."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorelei.lora.bank import AdapterBank
from lorelei.model.attention import PackedAttention, tree_blocks
from lorelei.types import FULL_WEIGHTS
from tests.decoders import load_decoder
from tests.parity.oracle import TOLERANCE, hf_logits, hf_model, relative, tolerance
from tests.parity.test_lora_parity import Piece, path, piece
from tests.tiny_models import make_tiny

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", {}),
}
PIECES = [
    piece(11, "a", 0),  # a prompt,
    piece(5, "a", 1, parent=0),  # two samples,
    piece(1, "a", 2, parent=0),
    piece(9, "a", 3),  # and a plain sequence
]
# the router rounds to fp32, here and in transformers: where a shared prefix is summed in another
# order one rounding may fall the other way, which is 1e-8 even in fp64
PLAIN = [piece(9, "a", 1), piece(23, "a", 2)]


def pieces_of(name: str) -> list[Piece]:
    return PLAIN if name == "qwen3_moe" else PIECES


def ours(
    bank: AdapterBank, pieces: list[Piece], recompute: bool = False
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Logits of every piece, and the gradients of all weights."""
    lengths = [len(p.tokens) for p in pieces]
    starts = [len(path(pieces, i)) - length for i, length in enumerate(lengths)]
    positions = [torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)]
    decoder, route = bank.model([(p.adapter, len(p.tokens)) for p in pieces])
    hidden = decoder(
        torch.tensor([t for p in pieces for t in p.tokens]).to(decoder.device),
        torch.cat(positions).to(decoder.device),
        route,
        PackedAttention(tree_blocks(lengths, [p.parent for p in pieces])),
        recompute,
    )
    logits = route(decoder.head, hidden)
    logits.backward(torch.cat([p.cotangent for p in pieces]).to(logits.device, logits.dtype))
    grads = {n: t.grad for n, t in bank["a"].tensors().items() if t.grad is not None}
    return list(logits.detach().cpu().split(lengths)), grads


def trained(folder: Path, dtype: torch.dtype) -> AdapterBank:
    bank = AdapterBank(load_decoder(folder, dtype))
    bank.add("a", FULL_WEIGHTS)
    return bank


def hf_gradients(model: nn.Module, pieces: list[Piece], dtype: torch.dtype) -> dict[str, Tensor]:
    """By the checkpoint's names: transformers 5 stacks a layer's experts."""
    model.requires_grad_(True)
    for i, one in enumerate(pieces):
        hf_logits(model, path(pieces, i))[-len(one.tokens) :].backward(one.cotangent.to(dtype))
    return dict(unstacked({n: p.grad for n, p in model.named_parameters() if p.grad is not None}))


def unstacked(named: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in named.items():
        prefix, _, kind = name.rpartition(".")
        if kind == "gate_up_proj":
            for e, both in enumerate(tensor):
                half = len(both) // 2
                yield f"{prefix}.{e}.gate_proj.weight", both[:half]
                yield f"{prefix}.{e}.up_proj.weight", both[half:]
        elif kind == "down_proj" and tensor.ndim == 3:
            yield from ((f"{prefix}.{e}.down_proj.weight", down) for e, down in enumerate(tensor))
        else:
            yield name, tensor


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_the_gradient_of_every_weight_are_those_of_transformers(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    family, options = MODELS[name]
    folder, pieces = make_tiny(family, tmp_path, **options), pieces_of(name)
    logits, grads = ours(trained(folder, dtype), pieces)
    model = hf_model(folder, dtype)
    for i, one in enumerate(pieces):
        expected = hf_logits(model, path(pieces, i))[-len(one.tokens) :]
        assert relative(logits[i], expected) < tolerance(dtype, name)
    expected = hf_gradients(model, pieces, dtype)
    assert grads.keys() == expected.keys()
    for tensor_name, grad in expected.items():
        assert relative(grads[tensor_name], grad) < tolerance(dtype, name), tensor_name


@pytest.mark.parametrize("name", ["llama-tied", "qwen3_moe"])
def test_recomputed_activations_give_the_same_gradients(name: str, tmp_path: Path) -> None:
    family, options = MODELS[name]
    folder = make_tiny(family, tmp_path, **options)
    _, kept = ours(trained(folder, torch.float32), PIECES)
    _, recomputed = ours(trained(folder, torch.float32), PIECES, recompute=True)
    assert kept.keys() == recomputed.keys()
    assert all(recomputed[n].equal(grad) for n, grad in kept.items())


def test_training_a_copy_leaves_the_base_alone(tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path, tie_word_embeddings=True)
    bank = trained(folder, torch.float32)
    with torch.no_grad():
        for tensor in bank["a"].tensors().values():
            tensor.zero_()
    fresh = load_decoder(folder)
    assert bank.decoder.embedding.equal(fresh.embedding)
    assert bank.decoder.norm.weight.equal(fresh.norm.weight)
    for one, other in zip(bank.decoder.linears(), fresh.linears(), strict=True):
        assert one.weight.dense().equal(other.weight.dense())
