"""Train engine fsdp: layouts that compute the same, foreign architectures, what is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM

from lorelei.lora.state import AdapterSnapshot, AdapterState
from lorelei.train.archon.engine import archon_engine
from lorelei.train.contract import TrainEngine
from lorelei.train.fsdp.kind import FsdpSpec
from lorelei.train.remote.engine import RemoteEngine
from lorelei.types import AdamHyper, AdapterSpec, Batch, Rollout
from tests.contract.oracle import PeftOracle, grpo_loss, turn_logprobs
from tests.contract.train_engines import (
    FSDP,
    GRPO,
    SMALL,
    adapters,
    assert_close,
    gradients,
    look,
    make_engine,
    randomise,
)
from tests.decoders import load_decoder
from tests.episodes import random_group, weighted_batch
from tests.tiny_models import make_tiny

pytestmark = pytest.mark.slow
FP32 = 1e-5  # two orders of summation in fp32 differ by about 1e-6
SPEC = AdapterSpec(rank=4, alpha=8)
# eps near the size of the gradients, see test_three_steps_are_those_of_torchs_adamw_on_the_oracle
HYPER = AdamHyper(lr=1e-2, eps=1e-3, weight_decay=0.1, max_grad_norm=0.5)


def some_groups(seed: int) -> list[tuple[Rollout, ...]]:
    rng = np.random.default_rng(seed)
    return [random_group(rng, 9, [7, 1, 12, 1]), random_group(rng, 3, [4, 5])]


def some_batch(seed: int) -> Batch:
    return weighted_batch("a", some_groups(seed))


def train(engine: TrainEngine, steps: range) -> list[float]:
    losses: list[float] = []
    for step in steps:
        losses.append(engine.forward_backward(some_batch(step), {"a": GRPO}).loss["a"])
        engine.optim_step({"a": HYPER})
    return losses


# --- layouts


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def engines(llama: Path) -> Iterator[dict[str, TrainEngine]]:
    """One of each layout, with the same adapter."""
    with ExitStack() as stack:
        made: dict[str, TrainEngine] = {}
        for kind in ("archon", *FSDP):
            made[kind] = make_engine(kind, llama)
            stack.callback(made[kind].close)
            made[kind].add_adapter("a", SPEC)
        yield made


def test_ten_steps_have_the_same_losses_on_every_layout(engines: dict[str, TrainEngine]) -> None:
    found: dict[str, list[float]] = {}
    for kind, engine in engines.items():
        randomise(engine, "a", seed=1)
        found[kind] = train(engine, range(10))
    expected = found["archon"]
    # a loss is a sum of terms of both signs, so its rounding is of their size, not of its own
    rounding = FP32 * max(abs(loss) for loss in expected)
    for losses in found.values():
        assert losses == pytest.approx(expected, rel=0, abs=rounding)


RESUMED = ("archon", "fsdp-dp2", "fsdp-tp2", "fsdp")
ONWARDS = {*zip(RESUMED, RESUMED[1:] + RESUMED[:1], strict=True)}  # into and out of each
PAIRS = [
    pytest.param(*pair, marks=() if pair in ONWARDS else pytest.mark.matrix)
    for pair in product(RESUMED, RESUMED)
]


@pytest.mark.parametrize(("here", "there"), PAIRS)
def test_a_snapshot_goes_on_in_any_engine_and_layout(
    here: str, there: str, engines: dict[str, TrainEngine]
) -> None:
    undisturbed, first, second = engines["archon"], engines[here], engines[there]
    start = randomise(undisturbed, "a", seed=2)
    train(undisturbed, range(5))
    expected = undisturbed.snapshot("a")
    first.restore("a", fresh(start))
    train(first, range(2))
    middle = first.snapshot("a")
    second.restore("a", middle)
    train(second, range(2, 5))
    got = second.snapshot("a")
    assert got.step == expected.step == 5
    assert_close(got.state.tensors, expected.state.tensors, FP32)
    assert_close(got.exp_avg, expected.exp_avg, 1e-4)  # of gradients near zero
    # the same with the optimizer's state lost must not pass
    second.restore("a", fresh(middle.state))
    train(second, range(2, 5))
    with pytest.raises(AssertionError):
        assert_close(second.adapter_state("a").tensors, expected.state.tensors, FP32)


def fresh(state: AdapterState) -> AdapterSnapshot:
    zeros = {n: torch.zeros_like(t) for n, t in state.tensors.items()}
    return AdapterSnapshot(state=state, exp_avg=zeros, exp_avg_sq=zeros, step=0)


def test_fewer_sequences_than_ranks_are_a_batch_too(engines: dict[str, TrainEngine]) -> None:
    group = random_group(np.random.default_rng(5), 4, [3])
    batch = weighted_batch("a", [group])
    for kind in ("fsdp-dp2", "fsdp-dp2-tp2"):
        for engine in (engines["archon"], engines[kind]):
            randomise(engine, "a", seed=3)
            engine.forward_backward(batch, {"a": GRPO})
        expected = look(engines["archon"], "a")["a"]
        assert_close(look(engines[kind], "a")["a"], expected, FP32)


# --- how the base is held


def options(folder: Path, **fields: Any) -> FsdpSpec:
    plain: dict[str, Any] = {"dtype": "float32", "max_tokens_per_mb": SMALL, "recompute": True}
    return FsdpSpec(model=str(folder), **{**plain, **fields})


@contextmanager
def started(spec: FsdpSpec, workers: int) -> Iterator[TrainEngine]:
    """An engine with the same adapter as every other one."""
    engine = RemoteEngine(spec, workers, timeout=120)
    try:
        engine.add_adapter("a", SPEC)
        randomise(engine, "a", seed=1)
        yield engine
    finally:
        engine.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_fp32_adapters_on_a_bf16_base_have_the_gradients_of_bf16_and_learn(
    workers: int, llama: Path, tmp_path: Path
) -> None:
    folder = rounded(llama, tmp_path / "rounded")
    archon = archon_engine(load_decoder(folder))
    archon.add_adapter("a", SPEC)
    tensors = randomise(archon, "a", seed=1).tensors
    ours: list[float] = []
    others: list[float] = []
    with started(options(folder, dtype="bfloat16"), workers) as engine:
        for seed in range(4):
            batch = some_batch(seed)
            exact = gradients(archon, batch, {"a": GRPO})["a"]
            oracle = PeftOracle(folder, torch.bfloat16, SPEC, tensors)
            grpo_loss(oracle, [r for group in some_groups(seed) for r in group]).backward()
            theirs = {n: p.grad for n, p in oracle.parameters.items() if p.grad is not None}
            ours.append(distance(gradients(engine, batch, {"a": GRPO})["a"], exact))
            others.append(distance(theirs, exact))
        # of products in bf16: 8 bits, that is 0.4%, some tens of times one after another
        assert np.mean(ours) < 0.05
        assert np.mean(ours) < 1.5 * np.mean(others), "transformers and peft do better"
        losses: list[float] = []
        for _ in range(5):
            losses.append(engine.forward_backward(some_batch(1), {"a": GRPO}).loss["a"])
            engine.optim_step({"a": replace(HYPER, weight_decay=0.0)})
        assert losses == sorted(losses, reverse=True)
        snapshot = engine.snapshot("a")
    for held in (snapshot.state.tensors, snapshot.exp_avg, snapshot.exp_avg_sq):
        assert {t.dtype for t in held.values()} == {torch.float32}


def rounded(folder: Path, to: Path) -> Path:
    """A checkpoint of numbers that bf16 has."""
    copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    tensors = {name: t.bfloat16().float() for name, t in tensors.items()}
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def distance(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Norm of the difference over norm of the reference, of all tensors together."""
    away, size = (
        torch.cat([t.double().flatten() for t in some])
        for some in ([got[n] - t for n, t in expected.items()], expected.values())
    )
    return float(away.norm() / size.norm())


@pytest.mark.parametrize(("workers", "dtype"), [(1, "float32"), (2, "bfloat16")])
def test_a_base_in_the_cpus_memory_computes_the_same_bits(
    workers: int, dtype: str, llama: Path
) -> None:
    ends: list[str] = []
    for offload in (False, True):
        spec = options(llama, cpu_offload=offload, dtype=dtype)
        with started(spec, workers) as engine:
            train(engine, range(1))
            engine.offload()  # for others, between steps
            engine.onload()
            train(engine, range(1, 2))
            ends.append(engine.adapter_state("a").digest())
    assert ends[0] == ends[1]


# --- any architecture


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("mistral", "fsdp-sp2"),
        ("gemma2", "fsdp-tp2"),
        ("phi", "fsdp-dp2"),
        pytest.param("mistral", "fsdp-dp2", marks=pytest.mark.matrix),
        pytest.param("gemma2", "fsdp-sp2", marks=pytest.mark.matrix),
        pytest.param("phi", "fsdp-tp2", marks=pytest.mark.matrix),
    ],
)
def test_a_foreign_architecture_has_the_gradients_of_peft_and_learns(
    family: str, kind: str, tmp_path: Path
) -> None:
    folder = make_tiny(family, tmp_path)
    groups = some_groups(7)
    rollouts = [r for group in groups for r in group]
    engine = make_engine(kind, folder)
    try:
        with adapters(engine, a=SPEC):
            tensors = engine.adapter_state("a").tensors
            oracle = PeftOracle(folder, torch.float32, SPEC, tensors, attention="eager")
            expected = grpo_loss(oracle, rollouts)
            expected.backward()
            batch = weighted_batch("a", groups)
            outputs = engine.forward_backward(batch, {"a": GRPO})
            got = look(engine, "a")["a"]
            turns = [t for r in rollouts for t in r.turns]
            logprobs = torch.cat([pair[0] for pair in turn_logprobs(oracle, turns, 1.0)])
            assert outputs.loss["a"] == pytest.approx(expected.item(), rel=FP32)
            found = torch.from_numpy(outputs.items.logprobs)
            assert_close({"": found}, {"": logprobs.detach()}, FP32)
            reached = {n: p.grad for n, p in oracle.parameters.items() if p.grad is not None}
            assert got.keys() == reached.keys()
            assert_close(got, reached, FP32)
            losses: list[float] = []
            for _ in range(4):
                losses.append(engine.forward_backward(batch, {"a": GRPO}).loss["a"])
                engine.optim_step({"a": replace(HYPER, weight_decay=0.0)})
            assert losses[-1] < losses[0]
    finally:
        engine.close()


# --- refused


def start(folder: Path, workers: int = 2, **options: int) -> RemoteEngine:
    spec = FsdpSpec(
        model=str(folder), dtype="float32", max_tokens_per_mb=64, recompute=False, **options
    )
    return RemoteEngine(spec, workers, timeout=60)


def test_heads_that_cannot_be_shared_out_are_refused(tmp_path: Path) -> None:
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3}
    folder = make_tiny("llama", tmp_path, hidden_size=96, **heads)
    with pytest.raises(ValueError, match=r"train.tensor_parallel: 2 does not divide the 3 att"):
        start(folder, tensor_parallel=2)
    with pytest.raises(ValueError, match=r"train.sequence_parallel: 2 does not divide the 3 att"):
        start(folder, sequence_parallel=2)


def test_models_whose_layers_mix_packed_sequences_are_refused(tmp_path: Path) -> None:
    MambaForCausalLM(
        MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1)
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="layers of mamba of mamba would mix packed"):
        start(tmp_path, workers=1)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    make_tiny("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no .safetensors file"):
        start(tmp_path, workers=1)
    make_tiny("llama", tmp_path, intermediate_size=64)
    make_tiny("llama", tmp_path / "other")
    (tmp_path / "config.json").write_text((tmp_path / "other/config.json").read_text())
    with pytest.raises(ValueError, match=r"gate_proj.weight' of .* has shape \[64, 64\]"):
        start(tmp_path, workers=1)
