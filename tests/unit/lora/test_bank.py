"""Adapters on a base model that is never written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorelei.inference.embedded.route import PublishedRoute
from lorelei.lora.bank import AdapterBank
from lorelei.lora.state import stable_seed
from lorelei.model.attention import PackedAttention, tree_blocks
from lorelei.model.decoder import Decoder
from lorelei.model.linear import Route
from lorelei.model.load import load_decoder
from lorelei.train.adam import AdapterOptimizer
from lorelei.types import AdamHyper, AdapterSpec
from tests.tiny_models import make_tiny

SPEC = AdapterSpec(rank=4, alpha=8)
Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen3", tmp_path_factory.mktemp("qwen3"))


@pytest.fixture
def bank(folder: Path) -> AdapterBank:
    return AdapterBank(load_decoder(folder))


def logits(decoder: Decoder, route: Route, length: int = 24) -> Tensor:
    tokens, positions = torch.arange(length) * 7 % 300, torch.arange(length)
    attend = PackedAttention(tree_blocks([length], [-1]))
    return route(decoder.head, decoder(tokens, positions, route, attend))


def randomise(bank: AdapterBank, name: str, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = bank.state(name).tensors
    bank.load(
        name, {n: torch.randn(t.shape, generator=generator) * 0.05 for n, t in tensors.items()}
    )


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).detach().norm() / expected.detach().norm())


def weights(decoder: Decoder) -> list[Tensor]:
    return [decoder.embedding.clone(), *(x.weight.dense().clone() for x in decoder.linears())]


def test_a_fresh_adapter_is_the_same_alone_and_among_others(folder: Path) -> None:
    decoder = load_decoder(folder)
    alone, among = AdapterBank(decoder), AdapterBank(decoder)
    alone.add("a", SPEC, seed=3)
    among.add("b", AdapterSpec(rank=8, alpha=1), seed=3)
    torch.rand(5)  # nor does the global random state matter
    among.add("a", SPEC, seed=3)
    narrow = AdapterBank(decoder)
    narrow.add("a", AdapterSpec(rank=4, alpha=8, target_modules=("q_proj",)), seed=3)
    tensors = alone.state("a").tensors
    assert all(tensors[n].equal(t) for n, t in among.state("a").tensors.items())
    assert all(tensors[n].equal(t) for n, t in narrow.state("a").tensors.items())


def test_a_fresh_adapter_is_uniform_in_a_and_zero_in_b(bank: AdapterBank) -> None:
    bank.add("a", AdapterSpec(rank=64, alpha=8), seed=0)
    bank.add("other seed", AdapterSpec(rank=64, alpha=8), seed=1)
    tensors = bank.state("a").tensors
    bound = 64**-0.5  # kaiming-uniform with a = sqrt(5), as peft and torch.nn.Linear
    a = tensors[Q_A]
    assert a.abs().max() <= bound
    assert a.std() == pytest.approx(bound / 3**0.5, rel=0.02)  # 4096 draws
    assert not any(t.any() for n, t in tensors.items() if "lora_B" in n)
    drawn = [t for n, t in tensors.items() if "lora_A" in n]
    drawn.append(bank.state("other seed").tensors[Q_A])
    assert len({t[0, 0].item() for t in drawn}) == len(drawn)  # no two modules or seeds alike


def test_a_fresh_adapter_changes_nothing(bank: AdapterBank) -> None:
    bank.add("a", AdapterSpec(rank=4, alpha=8, target_modules=("all-linear", "lm_head")))
    base = logits(bank.decoder, PublishedRoute([]))
    assert logits(bank.decoder, bank.route([("a", 24)])).equal(base)
    assert logits(bank.decoder, bank.route([(None, 24)])).equal(base)


def test_the_random_streams_are_the_same_in_every_process() -> None:
    assert stable_seed(1, "model.layers.0.self_attn.q_proj") == 8133254371400675372
    assert stable_seed(1, "2") != stable_seed(12)


def test_state_and_load_round_trip_bit_exactly_as_copies(bank: AdapterBank) -> None:
    bank.add("a", SPEC)
    randomise(bank, "a")
    state = bank.state("a")
    given = {n: t.clone() for n, t in state.tensors.items()}
    bank.add("b", SPEC)
    bank.load("b", given)
    for tensor in given.values():
        tensor.zero_()
    for live in bank["a"].tensors().values():
        live.detach().zero_()
    assert state.tensors[Q_A].any() and list(state.tensors) == sorted(state.tensors)
    assert bank.state("b").digest() == state.digest()
    assert bank.state("a").digest() != state.digest()


def test_wrong_tensors_are_refused_by_name_and_nothing_is_loaded(bank: AdapterBank) -> None:
    bank.add("a", SPEC)
    before = bank.state("a").digest()
    good = {n: torch.ones_like(t) for n, t in bank.state("a").tensors.items()}
    missing = {n: t for n, t in good.items() if n != Q_B}
    with pytest.raises(ValueError, match=f"adapter 'a': tensor '{Q_B}' is missing"):
        bank.load("a", missing)
    with pytest.raises(ValueError, match="adapter 'a': tensor 'extra' belongs to no target module"):
        bank.load("a", {**good, "extra": torch.ones(1)})
    with pytest.raises(ValueError, match=r"q_proj.lora_A.weight has shape \(4, 63\).*\(4, 64\)"):
        bank.load("a", {**good, Q_A: torch.ones(4, 63)})
    assert bank.state("a").digest() == before


def test_names_are_unique_and_unknown_ones_are_told(bank: AdapterBank) -> None:
    bank.add("a", SPEC)
    with pytest.raises(ValueError, match="adapter 'a' exists already"):
        bank.add("a", SPEC)
    with pytest.raises(KeyError, match="no adapter 'b'; there are: a"):
        bank.route([("b", 3)])
    bank.drop("a")
    assert "a" not in bank and list(bank) == []
    with pytest.raises(KeyError, match="there are: none"):
        bank.drop("a")


def test_a_target_that_matches_nothing_adds_no_adapter(bank: AdapterBank) -> None:
    with pytest.raises(ValueError, match="q_prj"):
        bank.add("a", AdapterSpec(rank=4, alpha=8, target_modules=("q_prj",)))
    assert "a" not in bank


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_the_merged_route_equals_the_unmerged_and_leaves_the_base_alone(
    family: str, tmp_path: Path
) -> None:
    decoder = load_decoder(make_tiny(family, tmp_path))
    bank = AdapterBank(decoder)
    before = weights(decoder)
    bank.add("a", AdapterSpec(rank=4, alpha=8, target_modules=("all-linear", "lm_head")))
    randomise(bank, "a")
    unmerged = logits(decoder, bank.route([("a", 24)]))
    merged = bank.merged("a")
    # the orders of the products differ; 1e-5 is a few fp32 roundings
    assert relative(logits(decoder, merged), unmerged) < 1e-5
    assert relative(unmerged, logits(decoder, PublishedRoute([]))) > 1e-2
    assert all(x.equal(y) for x, y in zip(before, weights(decoder), strict=True))
    randomise(bank, "a", seed=1)  # the copy is of one version
    assert relative(logits(decoder, merged), unmerged) < 1e-5


def test_a_merged_bf16_base_is_rounded_once(folder: Path) -> None:
    decoder = load_decoder(folder, torch.bfloat16)
    bank = AdapterBank(decoder)
    bank.add("a", AdapterSpec(rank=4, alpha=8, target_modules=("o_proj",)))
    randomise(bank, "a")
    layer = decoder.layers[0].out
    (part,) = bank["a"].layers[layer]
    eye = torch.eye(layer.in_features, dtype=torch.bfloat16)
    exact = layer.weight.dense().float() + 2.0 * part.b.detach() @ part.a.detach()
    assert bank.merged("a")(layer, eye).equal(exact.bfloat16().T)


def test_a_bf16_base_keeps_fp32_adapters(folder: Path) -> None:
    bank, wide = (
        AdapterBank(load_decoder(folder, dtype)) for dtype in (torch.bfloat16, torch.float32)
    )
    for one in (bank, wide):
        one.add("a", SPEC)
        randomise(one, "a")
    got = logits(bank.decoder, bank.route([("a", 24)]))
    assert got.dtype == torch.bfloat16
    assert relative(got.float(), logits(wide.decoder, wide.route([("a", 24)]))) < 0.05
    live = bank["a"].tensors()
    grads = torch.autograd.grad(got.float().square().sum(), list(live.values()))
    for grad in grads:
        assert grad.dtype == torch.float32 and grad.isfinite().all() and grad.any()
    assert all(t.dtype == torch.float32 for t in bank.state("a").tensors.values())


def dropout_masks(bank: AdapterBank, spans: list[tuple[str | None, int]], seed: int) -> Tensor:
    """[T, 64] what dropout multiplies each input by, read off an adapter that copies its input."""
    layer = bank.decoder.layers[0].qkv
    tensors = bank.state("a").tensors
    eyes = {n: torch.eye(*t.shape) if "q_proj" in n else t for n, t in tensors.items()}
    bank.load("a", eyes)
    x = torch.ones(sum(length for _, length in spans), 64)
    with torch.no_grad():
        return (bank.route(spans, seed)(layer, x) - layer.product(x))[:, :64]


def test_dropout_zeroes_its_share_and_scales_the_rest(bank: AdapterBank) -> None:
    bank.add("a", AdapterSpec(rank=64, alpha=64, dropout=0.3))
    mask = dropout_masks(bank, [("a", 400)], seed=5)
    kept = mask > 0.5
    # 25600 draws: four standard deviations are 0.0115
    assert float((~kept).float().mean()) == pytest.approx(0.3, abs=0.0115)
    assert torch.allclose(mask[kept], torch.tensor(1 / 0.7), atol=1e-5)
    assert torch.allclose(mask[~kept], torch.tensor(0.0), atol=1e-5)


def test_dropout_masks_repeat_for_a_seed_and_differ_otherwise(bank: AdapterBank) -> None:
    bank.add("a", AdapterSpec(rank=64, alpha=64, dropout=0.3))
    mask = dropout_masks(bank, [("a", 20)], seed=5)
    assert dropout_masks(bank, [("a", 20)], seed=5).equal(mask)
    assert not dropout_masks(bank, [("a", 20)], seed=6).equal(mask)
    apart = dropout_masks(bank, [("a", 20), (None, 3), ("a", 20)], seed=5)
    assert torch.allclose(apart[:20], mask, atol=1e-5)
    assert not apart[20:23].any()
    assert not torch.allclose(apart[23:], mask, atol=1e-5)


def test_there_is_no_dropout_without_a_seed(bank: AdapterBank) -> None:
    bank.add("a", AdapterSpec(rank=4, alpha=8, dropout=0.9))
    bank.add("dry", AdapterSpec(rank=4, alpha=8))
    for name in ("a", "dry"):
        randomise(bank, name)
    with_dropout = logits(bank.decoder, bank.route([("a", 24)]))
    assert with_dropout.equal(logits(bank.decoder, bank.route([("dry", 24)])))


def test_a_route_of_the_wrong_length_is_refused(bank: AdapterBank) -> None:
    bank.add("a", SPEC)
    with pytest.raises(AssertionError, match="route of 23 tokens, row of 24"):
        logits(bank.decoder, bank.route([("a", 23)]))


FUSED = AdapterSpec(rank=4, alpha=8, target_modules=("linear_qkv", "linear_proj", "linear_fc1"))


def test_fused_names_mean_layers_that_share_their_a(bank: AdapterBank) -> None:
    bank.add("a", FUSED)
    bank.add("separate", replace(FUSED, target_modules=("q_proj", "o_proj")))
    live, tensors = bank["a"].tensors(), bank.state("a").tensors
    k_a, o_a = (Q_A.replace("q_proj", name) for name in ("k_proj", "o_proj"))
    gate_a, up_a = (
        Q_A.replace("self_attn.q_proj", f"mlp.{name}") for name in ("gate_proj", "up_proj")
    )
    assert live[Q_A] is live[k_a] and live[gate_a] is live[up_a] and live[Q_A] is not live[o_a]
    assert tensors[Q_A] is tensors[k_a]
    assert {n.rpartition(".lora_")[0].rpartition(".")[2] for n in live} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")
    }
    # what is alone starts as it does under its own name
    assert tensors[o_a].equal(bank.state("separate").tensors[o_a])
    assert not tensors[Q_A].equal(bank.state("separate").tensors[Q_A])


def test_a_layer_that_is_excluded_leaves_the_others_tied(bank: AdapterBank) -> None:
    bank.add("a", replace(FUSED, target_modules=("linear_qkv",), exclude_modules=("k_proj",)))
    live = bank["a"].tensors()
    assert live[Q_A] is live[Q_A.replace("q_proj", "v_proj")]
    assert Q_A.replace("q_proj", "k_proj") not in live


def test_two_values_for_a_shared_a_are_refused(bank: AdapterBank) -> None:
    bank.add("a", FUSED)
    before = bank.state("a")
    other = {**before.tensors, Q_A: before.tensors[Q_A] + 1}
    with pytest.raises(ValueError, match=r"q_proj and .*k_proj share their A .*linear_qkv"):
        bank.load("a", other)
    assert bank.state("a").digest() == before.digest()


def test_a_shared_a_steps_once_by_the_sum_of_its_gradients(bank: AdapterBank) -> None:
    bank.add("a", FUSED)
    live = bank["a"].tensors()
    optimizer = AdapterOptimizer(live)
    for tensor in {id(t): t for t in live.values()}.values():
        tensor.grad = torch.full_like(tensor, 2.0)
    unique = sum(t.numel() for t in {id(t): t for t in live.values()}.values())
    norm = optimizer.grad_norm()
    assert norm is not None and norm.item() == pytest.approx(2 * unique**0.5)
    start = live[Q_A].detach().clone()
    optimizer.step(AdamHyper(lr=0.1, max_grad_norm=0), norm)
    assert (start - live[Q_A]).allclose(torch.tensor(0.1))  # once, not for each name
    assert optimizer.moments()[0].keys() == live.keys()
