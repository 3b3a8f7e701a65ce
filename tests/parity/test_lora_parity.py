"""Adapters and their gradients against peft, and against merged weights where peft cannot."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from lorelei.lora.bank import AdapterBank
from lorelei.model.attention import PackedAttention, tree_blocks
from lorelei.types import AdapterSpec
from tests.decoders import load_decoder
from tests.parity.oracle import (
    TOLERANCE,
    gradients,
    hf_logits,
    hf_model,
    peft_model,
    relative,
    tolerance,
)
from tests.tiny_models import make_tiny

VOCAB = 300
SPECS = {
    "rank-1": AdapterSpec(rank=1, alpha=1),
    "rank-8": AdapterSpec(rank=8, alpha=32),
    "rslora": AdapterSpec(rank=4, alpha=6, rslora=True),
    "queries-values": AdapterSpec(rank=4, alpha=8, target_modules=("q_proj", "v_proj")),
    "keys-up": AdapterSpec(rank=3, alpha=8, target_modules=("k_proj", "up_proj")),
    "outputs": AdapterSpec(rank=4, alpha=8, target_modules=("o_proj", "down_proj")),
    "head": AdapterSpec(rank=4, alpha=8, target_modules=("gate_proj", "lm_head")),
    "head-alone": AdapterSpec(rank=4, alpha=8, target_modules=("lm_head",)),
}
DTYPES = list(TOLERANCE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A segment with the gradient that its own logits receive."""

    tokens: tuple[int, ...]
    adapter: str | None
    parent: int
    cotangent: Tensor  # [T, V]


def piece(length: int, adapter: str | None, seed: int, parent: int = -1) -> Piece:
    generator = torch.Generator().manual_seed(seed)
    return Piece(
        tokens=tuple(torch.randint(0, VOCAB, (length,), generator=generator).tolist()),
        adapter=adapter,
        parent=parent,
        cotangent=torch.randn(length, VOCAB, generator=generator, dtype=torch.float64),
    )


def path(pieces: Sequence[Piece], index: int) -> list[int]:
    """Tokens from the root to the end of a segment: what a plain sequence would hold."""
    one = pieces[index]
    return [*(path(pieces, one.parent) if one.parent >= 0 else []), *one.tokens]


def make_bank(
    folder: Path, dtype: torch.dtype, specs: Mapping[str, AdapterSpec]
) -> tuple[AdapterBank, dict[str, dict[str, Tensor]]]:
    """Adapters whose B is not zero, and copies of their tensors."""
    bank = AdapterBank(load_decoder(folder, dtype))
    tensors: dict[str, dict[str, Tensor]] = {}
    for seed, (name, spec) in enumerate(specs.items()):
        bank.add(name, spec, seed)
        generator = torch.Generator().manual_seed(seed)
        tensors[name] = {
            n: torch.randn(t.shape, generator=generator, dtype=dtype) * 0.05
            for n, t in bank.state(name).tensors.items()
        }
        bank.load(name, tensors[name])
    return bank, tensors


def ours(
    bank: AdapterBank,
    pieces: Sequence[Piece],
    recompute: bool = False,
    dropout_seed: int | None = None,
) -> tuple[list[Tensor], dict[str, dict[str, Tensor]]]:
    """Logits of every piece and the gradients of every adapter, from one row."""
    decoder = bank.decoder
    lengths = [len(p.tokens) for p in pieces]
    starts = [len(path(pieces, i)) - length for i, length in enumerate(lengths)]
    positions = [torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)]
    route = bank.route([(p.adapter, len(p.tokens)) for p in pieces], dropout_seed)
    hidden = decoder(
        torch.tensor([t for p in pieces for t in p.tokens]).to(decoder.device),
        torch.cat(positions).to(decoder.device),
        route,
        PackedAttention(tree_blocks(lengths, [p.parent for p in pieces])),
        recompute,
    )
    logits = route(decoder.head, hidden)
    live = {(name, n): t for name in bank for n, t in bank[name].tensors().items()}
    cotangent = torch.cat([p.cotangent for p in pieces]).to(logits.device, logits.dtype)
    grads = torch.autograd.grad(logits, list(live.values()), cotangent, allow_unused=True)
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for (name, tensor_name), grad in zip(live, grads, strict=True):
        if grad is not None:
            found[name][tensor_name] = grad.cpu()
    return list(logits.detach().cpu().split(lengths)), found


def assert_agrees_with_peft(
    folder: Path, dtype: torch.dtype, specs: Mapping[str, AdapterSpec], pieces: Sequence[Piece]
) -> None:
    bank, tensors = make_bank(folder, dtype, specs)
    logits, grads = ours(bank, pieces)
    for name in specs:
        model = peft_model(folder, dtype, specs[name], tensors[name])
        for i in (i for i, p in enumerate(pieces) if p.adapter == name):
            expected = hf_logits(model, path(pieces, i))[-len(pieces[i].tokens) :]
            assert relative(logits[i], expected) < TOLERANCE[dtype]
            expected.backward(pieces[i].cotangent.to(dtype))
        assert_close(grads[name], gradients(model), dtype)
    base = hf_model(folder, dtype)
    for i in (i for i, p in enumerate(pieces) if p.adapter is None):
        expected = hf_logits(base, path(pieces, i))[-len(pieces[i].tokens) :]
        assert relative(logits[i], expected) < TOLERANCE[dtype]


def assert_close(
    got: Mapping[str, Tensor], expected: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    assert got.keys() <= expected.keys()
    for name, grad in expected.items():
        if name not in got:  # an expert that none of the adapter's tokens chose
            assert ".experts." in name and not grad.any(), name
        else:
            assert relative(got[name], grad) < TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("family", "spec"),
    [*(("qwen3", spec) for spec in SPECS), ("llama", "rank-8"), ("qwen2", "rank-8")],
)
def test_an_adapter_and_its_gradients_are_those_of_peft(
    family: str, spec: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = make_tiny(family, tmp_path)
    pieces = [piece(9, "a", 1), piece(23, "a", 2)]
    assert_agrees_with_peft(folder, dtype, {"a": SPECS[spec]}, pieces)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_an_adapter_on_a_tied_head_leaves_the_embedding_alone(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = make_tiny(family, tmp_path, tie_word_embeddings=True)
    assert_agrees_with_peft(folder, dtype, {"a": SPECS["head"]}, [piece(23, "a", 2)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_act_beside_biases_of_every_layer(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path, attention_bias=True, mlp_bias=True)
    assert_agrees_with_peft(folder, dtype, {"a": SPECS["rank-8"]}, [piece(23, "a", 2)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_and_base_tokens_in_one_row_are_each_as_alone_in_peft(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = make_tiny("qwen3", tmp_path)
    specs = {name: SPECS[name] for name in ("rank-8", "rslora", "queries-values", "head")}
    owners = ["rank-8", None, "rslora", "rank-8", "head", None, "queries-values", "rslora"]
    pieces = [piece(5 + 3 * i, name, i) for i, name in enumerate(owners)]
    assert_agrees_with_peft(folder, dtype, specs, pieces)


@pytest.mark.parametrize("dtype", DTYPES)
def test_shared_prefixes_give_the_gradients_of_peft_on_plain_sequences(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = make_tiny("qwen3", tmp_path)
    pieces = [
        piece(11, "rank-8", 0),  # a prompt,
        piece(5, "rank-8", 1, parent=0),  # two samples,
        piece(1, "rank-8", 2, parent=0),
        piece(7, "rank-8", 3, parent=0),  # and a first turn
        piece(4, "rank-8", 4, parent=3),  # with two continuations
        piece(6, "rank-8", 5, parent=3),
        piece(8, "rslora", 6),
        piece(9, "rslora", 7, parent=6),
        piece(3, None, 8),
        piece(3, None, 9, parent=8),
    ]
    specs = {name: SPECS[name] for name in ("rank-8", "rslora")}
    assert_agrees_with_peft(folder, dtype, specs, pieces)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "targets",
    [("all-linear",), ("all-linear", "lm_head"), (r".*experts\.[02]\.(up|down)_proj",)],
    ids=["all", "all-and-head", "some-experts"],
)
def test_adapters_on_experts_are_those_of_merged_weights(
    targets: tuple[str, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    """peft 0.18 leaves the stacked experts of transformers 5 out, so W + scale * B A is merged."""
    folder = make_tiny("qwen3_moe", tmp_path)
    specs = {
        "a": AdapterSpec(rank=4, alpha=8, target_modules=targets),
        "b": AdapterSpec(rank=2, alpha=6),
    }
    pieces = [piece(23, "a", 1), piece(9, "b", 2), piece(6, None, 3), piece(12, "a", 4)]
    bank, tensors = make_bank(folder, dtype, specs)
    logits, grads = ours(bank, pieces)
    model = hf_model(folder, dtype)
    for name, spec in specs.items():
        leaves = {n: t.clone().requires_grad_() for n, t in tensors[name].items()}
        for i in (i for i, p in enumerate(pieces) if p.adapter == name):
            merged = merged_weights(dict(model.named_parameters()), leaves, spec.scale)
            row = torch.tensor([pieces[i].tokens])
            options = {"input_ids": row, "use_cache": False}
            expected = functional_call(model, merged, kwargs=options).logits[0]
            assert relative(logits[i], expected) < tolerance(dtype, "qwen3_moe")
            expected.backward(pieces[i].cotangent.to(dtype))
        assert_close(grads[name], {n: t.grad for n, t in leaves.items()}, dtype)  # type: ignore[misc]
    assert relative(logits[2], hf_logits(model, pieces[2].tokens)) < tolerance(dtype, "qwen3_moe")


def merged_weights(
    weights: Mapping[str, Tensor], adapter: Mapping[str, Tensor], scale: float
) -> dict[str, Tensor]:
    """The model's parameters with scale * B A added; gradients reach A and B."""
    merged = {name: weight.clone() for name, weight in weights.items()}
    for name_a, a in adapter.items():
        if not name_a.endswith("lora_A.weight"):
            continue
        module = name_a.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        delta = scale * adapter[name_a.replace("lora_A", "lora_B")] @ a
        if ".experts." not in module:
            merged[f"{module}.weight"] = merged[f"{module}.weight"] + delta
            continue
        prefix, _, rest = module.partition(".experts.")
        number, _, kind = rest.partition(".")
        stacked = f"{prefix}.experts.{'down_proj' if kind == 'down_proj' else 'gate_up_proj'}"
        rows = {"gate_proj": slice(0, len(delta)), "up_proj": slice(len(delta), None)}.get(
            kind, slice(None)
        )
        merged[stacked][int(number), rows] += delta
    return merged


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_activations_give_the_same_gradients(
    family: str, dropout: float, tmp_path: Path
) -> None:
    folder = make_tiny(family, tmp_path)
    specs = {
        "a": AdapterSpec(rank=4, alpha=8, dropout=dropout),
        "b": AdapterSpec(rank=2, alpha=6, dropout=dropout, target_modules=("q_proj", "lm_head")),
    }
    bank, _ = make_bank(folder, torch.float32, specs)
    pieces = [piece(23, "a", 1), piece(9, "b", 2), piece(6, None, 3), piece(12, "a", 4)]
    kept_logits, kept = ours(bank, pieces, recompute=False, dropout_seed=7)
    logits, recomputed = ours(bank, pieces, recompute=True, dropout_seed=7)
    assert all(x.equal(y) for x, y in zip(kept_logits, logits, strict=True))
    for name in specs:
        assert all(recomputed[name][n].equal(grad) for n, grad in kept[name].items())
    _, other = ours(bank, pieces, recompute=True, dropout_seed=8)
    differs = any(not other["a"][n].equal(grad) for n, grad in kept["a"].items())
    assert differs == (dropout > 0)
