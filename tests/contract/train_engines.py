"""The train engines that the contract holds for, and the few steps that every test of it takes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lorelei.lora.state import AdapterSnapshot, AdapterState
from lorelei.train.archon.engine import archon_engine
from lorelei.train.archon.kind import ArchonSpec
from lorelei.train.batch import concatenate
from lorelei.train.contract import TrainEngine
from lorelei.train.fsdp.kind import FsdpSpec
from lorelei.train.megatron.kind import MegatronSpec
from lorelei.train.remote.engine import RemoteEngine
from lorelei.types import AdamHyper, AdapterSpec, Batch, LossSpec
from lorelei.venvs.recipe import interpreter
from tests.decoders import load_decoder
from tests.environments import needs
from tests.episodes import random_group, weighted_batch

MEGATRON: dict[str, dict[str, Any]] = {  # layouts: how many processes, and what MegatronSpec says
    "megatron": {"workers": 1},
    "megatron-tp2": {"workers": 2, "tensor_parallel": 2},
    "megatron-tp2-sp": {"workers": 2, "tensor_parallel": 2, "sequence_parallel": True},
    "megatron-pp2": {"workers": 2, "pipeline_parallel": 2},
    "megatron-dp2": {"workers": 2},
    "megatron-dp2-sharded": {"workers": 2, "distributed_optimizer": True},
    "megatron-cp2": {"workers": 2, "context_parallel": 2},
    "megatron-tp2-pp2": {"workers": 4, "tensor_parallel": 2, "pipeline_parallel": 2},
    "megatron-ep2": {"workers": 2, "expert_parallel": 2},
    "megatron-ep2-sharded": {"workers": 2, "expert_parallel": 2, "distributed_optimizer": True},
    "megatron-tp2-sp-ep2": {
        "workers": 2,
        "tensor_parallel": 2,
        "sequence_parallel": True,
        "expert_parallel": 2,
    },
    "megatron-ep2-pp2": {"workers": 4, "expert_parallel": 2, "pipeline_parallel": 2},
    "megatron-cp2-ep2": {"workers": 2, "context_parallel": 2, "expert_parallel": 2},
    "megatron-etp2": {
        "workers": 2,
        "tensor_parallel": 2,
        "sequence_parallel": True,
        "expert_tensor_parallel": 2,
    },
}
FSDP: dict[str, dict[str, Any]] = {  # the same of FsdpSpec
    "fsdp": {"workers": 1},
    "fsdp-dp2": {"workers": 2},
    "fsdp-tp2": {"workers": 2, "tensor_parallel": 2},
    "fsdp-sp2": {"workers": 2, "sequence_parallel": 2},
    "fsdp-dp2-tp2": {"workers": 4, "tensor_parallel": 2},
}
SEVERAL = tuple(pytest.param(kind, marks=pytest.mark.slow) for kind in ("archon-two-ranks", *FSDP))
ENGINES = ("archon", *SEVERAL, pytest.param("megatron", marks=needs("megatron")))
# of which other engines and families of the contract test both halves
MATRIX = {
    ("archon-two-ranks", "llama"),
    ("fsdp", "qwen3_moe"),
    ("fsdp-dp2", "llama"),
    ("fsdp-tp2", "qwen3_moe"),
    ("fsdp-sp2", "qwen3_moe"),
    ("fsdp-dp2-tp2", "llama"),
    ("megatron", "llama"),
    ("sglang", "qwen3"),
    ("sglang", "qwen3_moe"),
}
SMALL = 24  # tokens of a micro-batch: less than most trees of the tests

GRPO = LossSpec(path="lorelei.algo.clip:loss", params={"form": "plain"})
DECOUPLED = LossSpec(path="lorelei.algo.clip:loss", params={})
# the first moment of a step with beta1 = 0 is the gradient; lr = 0 leaves the weights alone
LOOK = AdamHyper(lr=0.0, beta1=0.0, max_grad_norm=0.0)


def make_engine(kind: str, folder: Path) -> TrainEngine:
    """An engine on a tiny model in fp32."""
    if kind == "archon":
        return archon_engine(load_decoder(folder))
    if kind in FSDP:
        options = dict(FSDP[kind])
        workers = options.pop("workers")
        spec = FsdpSpec(
            model=str(folder),
            dtype="float32",
            max_tokens_per_mb=SMALL,
            recompute=workers > 1,
            **options,
        )
        return RemoteEngine(spec, workers, timeout=120)
    if kind in MEGATRON:
        options = dict(MEGATRON[kind])
        workers = options.pop("workers")
        spec = MegatronSpec(
            model=str(folder),
            dtype="float32",
            max_tokens_per_mb=SMALL,
            recompute=workers > 1,
            **options,
        )
        return RemoteEngine(spec, workers, str(interpreter("megatron")), timeout=120)
    # ranks that also cut trees and recompute activations: every test then covers all three
    spec = ArchonSpec(model=str(folder), dtype="float32", max_tokens_per_mb=SMALL, recompute=True)
    return RemoteEngine(spec, workers=2, timeout=120)


def randomise(engine: TrainEngine, name: str, seed: int, scale: float = 0.05) -> AdapterState:
    """Give an adapter random tensors, so that B is not zero; returns them."""
    generator = torch.Generator().manual_seed(seed)
    state = engine.adapter_state(name)
    drawn: dict[int, Tensor] = {}  # names that share a tensor go on sharing it
    for t in state.tensors.values():
        numbers = torch.randn(t.shape, generator=generator, dtype=torch.float64) * scale
        drawn.setdefault(id(t), numbers.to(t.dtype))
    tensors = {n: drawn[id(t)] for n, t in state.tensors.items()}
    zeros = {n: torch.zeros_like(t) for n, t in tensors.items()}
    fresh = AdapterState(spec=state.spec, tensors=tensors)
    engine.restore(name, AdapterSnapshot(state=fresh, exp_avg=zeros, exp_avg_sq=zeros, step=0))
    return fresh


def gradients(
    engine: TrainEngine, batch: Batch, losses: Mapping[str, LossSpec]
) -> dict[str, dict[str, Tensor]]:
    """The gradients of one forward_backward, by adapter and tensor."""
    engine.forward_backward(batch, losses)
    return look(engine, *batch.adapters)


def look(engine: TrainEngine, *names: str) -> dict[str, dict[str, Tensor]]:
    """The gradients that these adapters hold; they are gone afterwards, nothing else changes."""
    before = {name: engine.snapshot(name) for name in names}
    engine.optim_step(dict.fromkeys(names, LOOK))
    found = {name: dict(engine.snapshot(name).exp_avg) for name in names}
    for name, snapshot in before.items():
        engine.restore(name, snapshot)
    return found


@contextmanager
def adapters(engine: TrainEngine, **specs: AdapterSpec) -> Iterator[None]:
    """Adapters with random tensors for the time of a test."""
    for seed, (name, spec) in enumerate(specs.items()):
        engine.add_adapter(name, spec)
        randomise(engine, name, seed)
    try:
        yield
    finally:
        for name in specs:
            with contextlib.suppress(KeyError):
                engine.drop_adapter(name)


def assert_a_stream_arrives(engine: TrainEngine, plain: TrainEngine, limit: float) -> None:
    """A loss reads a stream of its own; beside it trains an adapter that has no such stream."""
    follows = LossSpec(path="tests.contract.losses:follows", params={}, streams=("teacher",))
    rng = np.random.default_rng(11)
    batches: list[Batch] = []
    for name in "ab":
        groups = [random_group(rng, 9, [7, 1, 12, 1], name), random_group(rng, 3, [4, 5], name)]
        batches.append(weighted_batch(name, groups))
    items = batches[0].items
    teacher = rng.normal(-6.0, 2.0, len(items)).astype(np.float32)
    with_teacher = replace(items, streams={**items.streams, "teacher": teacher})
    mixed = concatenate([replace(batches[0], items=with_teacher), batches[1]])
    losses = {"a": follows, "b": GRPO}
    spec = AdapterSpec(rank=4, alpha=8)
    with adapters(engine, a=spec, b=spec), adapters(plain, a=spec, b=spec):
        expected, got = (e.forward_backward(mixed, losses) for e in (plain, engine))
        reference, found = look(plain, "a", "b"), look(engine, "a", "b")
    for name in "ab":
        assert got.loss[name] == pytest.approx(expected.loss[name], rel=limit)
        assert_close(found[name], reference[name], limit)
    total = float((teacher * items.weight).sum())
    assert got.metrics["a"]["teacher"] == pytest.approx(total, rel=limit)


def assert_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def assert_close(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], limit: float) -> None:
    """Norm of the difference over norm of the reference, for each tensor."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (got[name].double() - tensor.double()).norm()
        assert error <= limit * tensor.double().norm(), (name, error / tensor.double().norm())
