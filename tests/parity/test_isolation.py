"""Adapters that share a base model, a train step and a batch do not touch each other or the base.

Three adapters of different rank, learning rate, loss and data train together for 20 steps; each
must end as the same adapter trained alone on the same samples. Together and alone differ only in
how many rows stand in a matrix product, that is in the order of summation.

The tolerance is honest because of eps: Adam divides a gradient by its own size, so a gradient that
is nothing but rounding noise would move a weight by the whole learning rate in a direction that
noise chose. With eps of the order of the gradients an error in a gradient reaches the weight
divided by eps at most, and stays as small relative to the distance travelled. In fp64 noise is
1e-16, so there Adam's usual eps is kept, and no tolerance can hide a leak.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lorelei.inference.embedded.engine import EmbeddedEngine
from lorelei.lora.state import AdapterSnapshot
from lorelei.model.decoder import Decoder
from lorelei.model.mlp import Moe
from lorelei.train.archon.engine import archon_engine
from lorelei.train.batch import concatenate
from lorelei.types import (
    AdamHyper,
    AdapterRef,
    AdapterSpec,
    Batch,
    Completion,
    GenerateRequest,
    LossSpec,
    SamplingParams,
)
from tests.contract.train_engines import randomise
from tests.decoders import load_decoder
from tests.episodes import random_group, weighted_batch
from tests.tiny_models import make_tiny

STEPS = 20
LIMIT = {torch.float32: 1e-5, torch.float64: 1e-10}
EPS = {torch.float32: 1e-2, torch.float64: 1e-8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What one adapter learns from, and how."""

    name: str
    spec: AdapterSpec
    lr: float
    loss: LossSpec
    seed: int

    def batch(self, step: int) -> Batch:
        rng = np.random.default_rng((self.seed, step))
        return weighted_batch(self.name, [random_group(rng, 5 + self.seed, [3, 1, 6], self.name)])


GRPO = "lorelei.algo.clip:loss"
TASKS = (
    Task(
        name="a",
        spec=AdapterSpec(rank=2, alpha=4),
        lr=1e-3,
        loss=LossSpec(path=GRPO, params={"form": "plain"}),
        seed=1,
    ),
    Task(
        name="b",
        spec=AdapterSpec(rank=8, alpha=8, target_modules=("q_proj", "v_proj", "down_proj")),
        lr=1e-2,
        loss=LossSpec(path="tests.contract.losses:likelihood", params={"factor": 1.0}),
        seed=2,
    ),
    Task(
        name="c",
        spec=AdapterSpec(rank=5, alpha=16, rslora=True),
        lr=3e-3,
        loss=LossSpec(path="lorelei.algo.rloo:loss", params={}),
        seed=3,
    ),
)


def train(
    decoder: Decoder, tasks: Sequence[Task], recompute: bool = False
) -> dict[str, tuple[AdapterSnapshot, AdapterSnapshot]]:
    """(start, end) of every task's adapter; all of them are in every batch."""
    engine = archon_engine(decoder, max_tokens_per_mb=40, recompute=recompute)
    for task in tasks:
        engine.add_adapter(task.name, task.spec)
        randomise(engine, task.name, task.seed)
    start = {task.name: engine.snapshot(task.name) for task in tasks}
    eps = EPS[decoder.dtype]
    for step in range(STEPS):
        order = tasks if step % 2 else tasks[::-1]
        batch = concatenate([task.batch(step) for task in order])
        engine.forward_backward(batch, {task.name: task.loss for task in tasks})
        engine.optim_step({task.name: AdamHyper(lr=task.lr, eps=eps) for task in tasks})
    return {name: (snapshot, engine.snapshot(name)) for name, snapshot in start.items()}


def assert_trained_as_alone(
    decoder: Decoder, together: dict[str, tuple[AdapterSnapshot, AdapterSnapshot]]
) -> None:
    limit = LIMIT[decoder.dtype]
    for task in TASKS:
        start, alone = train(decoder, [task])[task.name]
        _, shared = together[task.name]
        assert shared.step == alone.step == STEPS
        for name, expected in alone.state.tensors.items():
            got = shared.state.tensors[name]
            assert distance(got, expected) <= limit, name
            # most of a weight is where it started: what was learned must agree as well
            origin = start.state.tensors[name]
            assert distance(got - origin, expected - origin) <= 10 * limit, name
            for field in ("exp_avg", "exp_avg_sq"):
                moment = getattr(alone, field)[name]
                assert distance(getattr(shared, field)[name], moment) <= limit, (field, name)


def distance(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over norm of the reference."""
    if not expected.any():  # an expert that no token reached
        return float(got.any())
    return float((got - expected).double().norm() / expected.double().norm())


def base_digest(decoder: Decoder) -> str:
    """sha256 over every weight of the base model, as the products use it."""
    sha = hashlib.sha256()
    tensors = [decoder.embedding, decoder.norm.weight]
    for linear in decoder.linears():
        tensors.append(linear.weight.dense())
        if linear.bias is not None:
            tensors.append(linear.bias)
    for layer in decoder.layers:
        norms = (layer.input_norm, layer.mlp_norm, layer.q_norm, layer.k_norm)
        tensors += [norm.weight for norm in norms if norm is not None]
        if isinstance(layer.mlp, Moe):
            tensors.append(layer.mlp.router)
    for tensor in tensors:
        sha.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return sha.hexdigest()


@pytest.fixture(params=[torch.float64, torch.float32], ids=["fp64", "fp32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_adapters_trained_together_equal_each_trained_alone(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    decoder = load_decoder(make_tiny(family, tmp_path), dtype)
    before = base_digest(decoder)
    together = train(decoder, TASKS)
    for start, end in together.values():
        for name, tensor in start.state.tensors.items():
            if ".experts." not in name:
                assert distance(end.state.tensors[name], tensor) > 1e-3, name  # they did learn
    assert_trained_as_alone(decoder, together)
    assert base_digest(decoder) == before


def test_recomputed_activations_keep_adapters_apart(dtype: torch.dtype, tmp_path: Path) -> None:
    decoder = load_decoder(make_tiny("llama", tmp_path), dtype)
    assert_trained_as_alone(decoder, train(decoder, TASKS, recompute=True))


@pytest.mark.parametrize("recompute", [False, True])
def test_generation_during_backward_passes_disturbs_neither_side(
    recompute: bool, tmp_path: Path
) -> None:
    decoder = load_decoder(make_tiny("llama", tmp_path), torch.float64)
    before = base_digest(decoder)
    with generating(decoder) as bursts:
        count = len(bursts)
        together = train(decoder, TASKS, recompute)
        during = len(bursts) - count
    assert during >= 2  # whole bursts were drawn between the first step and the last
    assert all(same(burst, bursts[0]) for burst in bursts)
    assert_trained_as_alone(decoder, together)
    assert base_digest(decoder) == before


@contextmanager
def generating(decoder: Decoder) -> Iterator[list[list[Completion]]]:
    """A thread that draws the same completions from two published adapters again and again."""
    bursts: list[list[Completion]] = []
    stop, first = threading.Event(), threading.Event()

    async def draw() -> None:
        engine = EmbeddedEngine(decoder)
        publisher = archon_engine(decoder)
        refs: list[AdapterRef | None] = [None]
        for seed, name in enumerate(("x", "y")):
            publisher.add_adapter(name, AdapterSpec(rank=3, alpha=6))
            state = randomise(publisher, name, seed)
            ref = AdapterRef(name=name, version=1, run_id="test", digest=state.digest())
            await engine.load(ref, state)
            refs.append(ref)
        while not stop.is_set():
            bursts.append(await asyncio.gather(*(engine.generate(r) for r in requests(refs))))
            first.set()
        await engine.close()

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(asyncio.run, draw())
        try:
            assert first.wait(60)
            yield bursts
        finally:
            stop.set()
            done.result()


def requests(refs: Sequence[AdapterRef | None]) -> list[GenerateRequest]:
    sampling = SamplingParams(max_new_tokens=4, seed=3)
    return [
        GenerateRequest(
            tokens=np.arange(4 + i, dtype=np.int32), adapter=ref, sampling=sampling, key=str(i)
        )
        for i, ref in enumerate(refs)
    ]


def same(one: Sequence[Completion], other: Sequence[Completion]) -> bool:
    return all(
        np.array_equal(x.tokens, y.tokens) and np.array_equal(x.logprobs, y.logprobs)
        for x, y in zip(one, other, strict=True)
    )
