"""Megatron where a model is split: against transformers, and in turn with the other engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lorelei.lora.state import AdapterState, tensor_names
from lorelei.train.archon.engine import archon_engine
from lorelei.train.batch import concatenate
from lorelei.train.contract import TrainEngine
from lorelei.train.megatron.kind import MegatronSpec
from lorelei.train.remote.engine import RemoteEngine
from lorelei.types import BASE, AdamHyper, AdapterSpec, Batch, LossSpec, Rollout
from lorelei.venvs.recipe import interpreter
from tests.contract.oracle import grpo_loss, make_oracle, turn_logprobs
from tests.contract.train_engines import (
    DECOUPLED,
    GRPO,
    adapters,
    assert_a_stream_arrives,
    assert_close,
    assert_equal,
    gradients,
    look,
    make_engine,
)
from tests.decoders import load_decoder
from tests.environments import needs
from tests.episodes import random_group, weighted_batch
from tests.tiny_models import make_tiny

pytestmark = needs("megatron")

FP32 = 1e-5  # two orders of summation in fp32 differ by about 1e-6
LAYOUTS = {"megatron-tp2-pp2": "qwen3", "megatron-tp2-sp-ep2": "qwen3_moe"}
SEPARATE = AdapterSpec(rank=4, alpha=8)
FUSED = replace(SEPARATE, target_modules=("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"))
# eps near the size of the gradients, see test_train_contract
HYPER = AdamHyper(lr=1e-2, eps=1e-3, weight_decay=0.1, max_grad_norm=0.5)


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(layout: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(LAYOUTS[layout], tmp_path_factory.mktemp(layout), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def engine(layout: str, folder: Path) -> Iterator[TrainEngine]:
    made = make_engine(layout, folder)
    yield made
    made.close()


@pytest.fixture(scope="module")
def sharded(folder: Path) -> Iterator[TrainEngine]:
    made = make_engine("fsdp", folder)
    yield made
    made.close()


def some_groups(seed: int) -> list[tuple[Rollout, ...]]:
    rng = np.random.default_rng(seed)
    return [random_group(rng, 9, [7, 1, 12, 1], "a"), random_group(rng, 3, [4, 5], "a")]


def some_batch(seed: int, adapter: str = "a") -> Batch:
    rng = np.random.default_rng(seed)
    groups = [random_group(rng, 9, [7, 12], adapter), random_group(rng, 3, [4, 5], adapter)]
    return weighted_batch(adapter, groups)


@pytest.mark.parametrize("spec", [SEPARATE, FUSED], ids=["separate", "fused"])
def test_a_split_model_has_the_gradients_of_transformers(
    engine: TrainEngine, layout: str, folder: Path, spec: AdapterSpec
) -> None:
    groups = some_groups(1)
    batch = weighted_batch("a", groups)
    rollouts = [r for group in groups for r in group]
    with adapters(engine, a=spec):
        tensors = engine.adapter_state("a").tensors
        base = engine.logprobs(batch, BASE).logprobs
        oracle = make_oracle(LAYOUTS[layout], folder, torch.float32, spec, tensors)
        grpo_loss(oracle, rollouts).backward()
        outputs = engine.forward_backward(batch, {"a": GRPO})
        got = look(engine, "a")["a"]
        engine.forward_backward(batch, {"a": GRPO})
        engine.optim_step({"a": HYPER})
        again = engine.logprobs(batch, BASE).logprobs
    turns = [t for r in rollouts for t in r.turns]
    expected = torch.cat([pair[0] for pair in turn_logprobs(oracle, turns, 1.0)]).detach()
    assert_close({"": torch.from_numpy(outputs.items.logprobs)}, {"": expected}, FP32)
    reached = {n: p.grad for n, p in oracle.parameters.items() if p.grad is not None}
    assert_close({n: got[n] for n in reached}, reached, FP32)
    assert all(not got[n].any() for n in got.keys() - reached.keys())
    np.testing.assert_array_equal(base, again)  # training never writes the base model


def test_a_stream_of_any_name_reaches_the_loss_token_by_token(
    engine: TrainEngine, folder: Path
) -> None:
    assert_a_stream_arrives(engine, archon_engine(load_decoder(folder)), FP32)


def test_layers_that_share_their_a_keep_it(engine: TrainEngine) -> None:
    with adapters(engine, a=FUSED):
        engine.forward_backward(some_batch(1), {"a": GRPO})
        engine.optim_step({"a": HYPER})
        tensors = engine.adapter_state("a").tensors
    layer = "model.layers.1.self_attn"
    q, k, v = (
        tensors[tensor_names(f"{layer}.{leaf}")[0]] for leaf in ("q_proj", "k_proj", "v_proj")
    )
    assert q is k and k is v  # it crossed the border once


@pytest.mark.parametrize("spec", [SEPARATE, FUSED], ids=["separate", "fused"])
def test_an_adapter_that_changes_engines_trains_as_on_one(
    engine: TrainEngine, sharded: TrainEngine, folder: Path, spec: AdapterSpec
) -> None:
    archon = archon_engine(load_decoder(folder))

    def train(on: TrainEngine, name: str, steps: range) -> None:
        for step in steps:
            on.forward_backward(some_batch(step, name), {name: GRPO})
            on.optim_step({name: HYPER})

    with (
        adapters(engine, moves=spec),
        adapters(sharded, moves=spec),
        adapters(archon, moves=spec, stays=spec),
    ):
        archon.restore("stays", archon.snapshot("moves"))
        moved = archon.snapshot("moves")
        train(archon, "stays", range(8))
        for place, on in enumerate((engine, sharded, archon, engine)):
            on.restore("moves", moved)
            train(on, "moves", range(2 * place, 2 * place + 2))
            moved = on.snapshot("moves")
        stayed = archon.snapshot("stays")
    assert moved.step == stayed.step == 8
    assert_close(moved.state.tensors, stayed.state.tensors, FP32)
    # without its moments an adapter would end elsewhere
    for field in ("exp_avg", "exp_avg_sq"):
        assert_close(getattr(moved, field), getattr(stayed, field), 1e-4)


def test_two_adapters_on_one_model_train_as_each_alone(engine: TrainEngine) -> None:
    other = AdapterSpec(rank=2, alpha=6, target_modules=("q_proj", "v_proj"))
    losses: dict[str, LossSpec] = {"a": GRPO, "b": DECOUPLED}

    def train(*names: str) -> dict[str, AdapterState]:
        with adapters(engine, **{"a": SEPARATE, "b": other}):
            for step in range(2):
                batch = concatenate([some_batch(step, name) for name in names])
                engine.forward_backward(batch, {name: losses[name] for name in names})
                engine.optim_step(dict.fromkeys(names, HYPER))
            return {name: engine.adapter_state(name) for name in names}

    both = train("a", "b")
    for name in "ab":
        assert_close(train(name)[name].tensors, both[name].tensors, FP32)


def test_a_base_that_was_in_the_hosts_memory_computes_the_same_bits(engine: TrainEngine) -> None:
    with adapters(engine, a=SEPARATE):
        expected = gradients(engine, some_batch(1), {"a": GRPO})["a"]
        engine.offload()
        assert engine.adapter_state("a").digest(), "adapters stay, and can be read"
        engine.onload()
        assert_equal(gradients(engine, some_batch(1), {"a": GRPO})["a"], expected)


def test_a_loss_that_fails_on_one_rank_leaves_all_of_them_at_work(engine: TrainEngine) -> None:
    refuses = LossSpec(path="tests.contract.losses:refuses", params={})
    with adapters(engine, a=SEPARATE):
        expected = gradients(engine, some_batch(1), {"a": GRPO})["a"]
        with pytest.raises(ValueError, match="this one refuses"):
            engine.forward_backward(some_batch(1), {"a": refuses})
        assert_equal(gradients(engine, some_batch(1), {"a": GRPO})["a"], expected)


def test_a_head_that_is_split_is_adapted(engine: TrainEngine, folder: Path) -> None:
    spec = AdapterSpec(rank=2, alpha=4, target_modules=("o_proj", "lm_head"))
    archon = archon_engine(load_decoder(folder))
    with adapters(engine, a=spec), adapters(archon, a=spec):
        expected = gradients(archon, some_batch(1), {"a": GRPO})["a"]
        assert_close(gradients(engine, some_batch(1), {"a": GRPO})["a"], expected, FP32)


def test_a_rank_that_predicts_none_of_a_rows_items_takes_part(tmp_path: Path) -> None:
    """Under context parallelism the prompt may be all that a rank has of a row."""
    place = make_tiny("llama", tmp_path)
    spec = AdapterSpec(rank=2, alpha=4, target_modules=("o_proj", "lm_head"))
    batch = weighted_batch("a", [random_group(np.random.default_rng(2), 15, [3])])
    archon = archon_engine(load_decoder(place))
    with (
        closing(make_engine("megatron-cp2", place)) as engine,
        adapters(engine, a=spec),
        adapters(archon, a=spec),
    ):
        expected = gradients(archon, batch, {"a": GRPO})["a"]
        assert_close(gradients(engine, batch, {"a": GRPO})["a"], expected, FP32)


def test_a_model_that_cannot_be_built_says_why(tmp_path: Path) -> None:
    spec = MegatronSpec(model=str(tmp_path), dtype="float32", max_tokens_per_mb=64, recompute=False)
    with pytest.raises(ValueError, match="has neither config"):
        RemoteEngine(spec, 1, str(interpreter("megatron")), timeout=60)


def test_every_linear_layer_has_a_place(engine: TrainEngine, folder: Path) -> None:
    archon = archon_engine(load_decoder(folder))
    spec = AdapterSpec(rank=1, alpha=1, target_modules=("all-linear", "lm_head"))
    with adapters(engine, a=spec), adapters(archon, a=spec):
        assert engine.adapter_state("a").tensors.keys() == archon.adapter_state("a").tensors.keys()
