"""The parts of the memory estimate, against the tensors that the engines hold."""

from __future__ import annotations

import json
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorelei.inference.embedded.kv_cache import RowCache
from lorelei.inference.embedded.route import low_rank
from lorelei.lora.bank import AdapterBank
from lorelei.lora.full import serving_copy
from lorelei.lora.state import AdapterState
from lorelei.lora.targets import match_targets, module_shapes
from lorelei.model.attention import PackedAttention, tree_blocks
from lorelei.model.backend import DTYPES, default_device
from lorelei.model.config import DecoderConfig
from lorelei.model.decoder import Decoder
from lorelei.model.load import load_decoder
from lorelei.model.mlp import Moe
from lorelei.model.weights import named_tensors
from lorelei.plan import memory
from lorelei.plan.adapter_size import AdapterSize, full_size, lora_size
from lorelei.plan.hardware import has_accelerator
from lorelei.plan.memory import Footprint, estimate_memory
from lorelei.plan.model_info import count_parameters
from lorelei.run_file import validate
from lorelei.types import FULL_WEIGHTS, AdapterSpec
from tests.tiny_models import FAMILIES, make_tiny

SPECS = (
    AdapterSpec(rank=4, alpha=8.0),
    AdapterSpec(rank=4, alpha=8.0, target_modules=("q_proj", "up_proj")),
)
TOKENS = 192


def size_of(folder: Path, spec: AdapterSpec = SPECS[0]) -> AdapterSize:
    raw = json.loads((folder / "config.json").read_text())
    model, shapes = DecoderConfig.from_hf(raw), module_shapes(raw)
    if spec.full:
        return full_size(model, sum(count_parameters(model, shapes, raw).values()))
    modules = match_targets(list(shapes), spec, model.architecture)
    return lora_size(model, shapes, modules, spec.rank)


def footprint(folder: Path, on_cpu: bool = True, adapters: int = 1, **sections: Any) -> Footprint:
    """Of a run on the checkpoint in `folder`."""
    raw = json.loads((folder / "config.json").read_text())
    model = DecoderConfig.from_hf(raw)
    config = {
        "model": str(folder),
        "task": {"kind": "reasoning_gym", "name": "chain_sum"},
        "eval": {"every": 0},
        "adapters": {f"a{n}": {} for n in range(adapters)},
        **sections,
    }
    return Footprint(
        config=validate(config),
        model=model,
        base=sum(count_parameters(model, module_shapes(raw), raw).values()),
        stored="float32",
        adapters=(size_of(folder),) * adapters,
        on_cpu=on_cpu,
    )


def total(phases: dict[str, dict[str, int]], phase: str) -> int:
    return sum(phases[phase].values())


def matrices(decoder: Decoder) -> int:
    """Bytes of the linear layers; oneDNN pads those of tiny models further."""
    return sum(4 * prod(linear.weight.shape) for linear in decoder.linears())


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_tiny(request.param, tmp_path, tie_word_embeddings=True)


def forward(decoder: Decoder, bank: AdapterBank) -> Tensor:
    """One sequence of TOKENS tokens through the adapter."""
    tokens = torch.randint(300, (TOKENS,), generator=torch.Generator().manual_seed(0))
    attend = PackedAttention(tree_blocks([TOKENS], [-1]))
    return decoder(tokens, torch.arange(TOKENS), bank.route([("a", TOKENS)]), attend)


@pytest.mark.parametrize("tied", [True, False])
def test_base_model_counts_every_matrix_the_decoder_holds(tmp_path, tied):
    folder = make_tiny("qwen3", tmp_path, tie_word_embeddings=tied)
    decoder = load_decoder(folder)
    others = [t for n, t in named_tensors(decoder) if "norm" in n or "embed" in n]
    assert memory.base_bytes(footprint(folder)) == matrices(decoder) + nbytes(others)


@pytest.mark.parametrize("spec", SPECS)
def test_adapter_counts_what_is_trained_published_and_merged(folder, spec):
    decoder, size = load_decoder(folder), size_of(folder, spec)
    bank = AdapterBank(decoder)
    adapter = bank.add("a", spec)
    tensors = nbytes(adapter.tensors().values())
    assert 4 * size.trained == 4 * size.published == tensors
    serving = low_rank(bank.lora("a"), torch.float64).values()  # kernels fill up odd ranks
    assert size.serving == sum(layer.a_DR.numel() + layer.b.numel() for layer in serving)
    merged = bank.merged("a")._weights.values()
    assert size.merged == sum(prod(weight.shape) for weight in merged)


def test_full_weights_count_what_serves_them(tmp_path):
    folder = make_tiny("qwen2", tmp_path, tie_word_embeddings=True)
    decoder, size = load_decoder(folder), size_of(folder, FULL_WEIGHTS)
    state = AdapterState(spec=FULL_WEIGHTS, tensors=dict(named_tensors(decoder)))
    assert 4 * size.trained == nbytes(state.tensors.values())
    served = serving_copy(decoder, "a", state)
    others = [t for n, t in named_tensors(served) if not n.endswith("proj.weight")]
    assert 4 * size.serving == matrices(served) + nbytes(others)


def test_activations_are_what_autograd_keeps(folder):
    decoder = load_decoder(folder)
    bank = AdapterBank(decoder)
    bank.add("a", SPECS[0])
    held = [*dict(named_tensors(decoder)).values(), *bank["a"].tensors().values()]
    weights = {tensor.untyped_storage().data_ptr() for tensor in held}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (storage := tensor.untyped_storage().data_ptr()) not in weights:
            kept[storage] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(decoder, bank)
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    model = decoder.config
    estimated = 4 * TOKENS * (model.layers * memory.block_elements(footprint(folder)))
    # angles, the last norm's input and, of experts, which token went where are not counted
    small = 0.25 if isinstance(decoder.layers[0].mlp, Moe) else 0.1
    assert abs(found - estimated) < small * found


def test_recomputing_keeps_only_the_inputs_of_blocks(folder):
    run = footprint(folder)
    again = footprint(folder, train={"gradient_checkpointing": True})
    each = memory.block_elements(run) - run.model.hidden
    saved = 4 * memory.micro_batch_tokens(run) * run.model.layers * each
    # at this size a block computed again needs less than the logits do
    assert memory.activation_bytes(run) - memory.activation_bytes(again) == saved


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("new", [1, 33, 34, 64, 65, 66, 129, 130])
def test_rows_have_the_room_that_the_cache_gives_them(folder, new, gpu):
    """gpu: the cache of CUDA's fused attention, here in this machine's memory."""
    dtype = "bfloat16" if gpu else "float32"
    run = footprint(folder, on_cpu=not gpu, dtype=dtype, rollout={"max_new_tokens": new})
    cache, peak = RowCache(load_decoder(folder, DTYPES[dtype])), 0
    cache._whole_tokens = gpu
    cache.release()
    for cached in range(1, max(new, 2)):  # the last token is not read
        before = cache.nbytes
        cache.reserve(3, cached)
        # while values grow, the new keys and both old and new values are there
        grown = cache.nbytes != before and before > 0
        peak = max(peak, cache.nbytes + before // 2 * grown)
    assert memory.kv_cache_bytes(run, 0, 3) == peak


def test_samples_of_a_prompt_share_its_cache(folder):
    few, many = (
        footprint(folder, rollout={"n_samples": n}, algo={"batch_size": 2}) for n in (2, 6)
    )
    assert memory.in_flight(few, evaluating=False) == (2, 4)
    assert memory.in_flight(many, evaluating=False) == (2, 12)
    prompts = memory.kv_cache_bytes(many, 2, 0)
    assert prompts == memory.kv_cache_bytes(few, 2, 0) > 0


def test_no_more_rows_are_counted_than_may_run(folder):
    run = footprint(
        folder,
        rollout={"max_running": 10},
        algo={"batch_size": 4},
        eval={"every": 1, "n_prompts": 30},
    )
    assert memory.in_flight(run, evaluating=False) == (4, 10)
    assert memory.in_flight(run, evaluating=True) == (10, 10)


def test_micro_batch_is_no_larger_than_the_step_of_a_worker(folder):
    small: dict[str, Any] = {
        "task": {"kind": "reasoning_gym", "name": "chain_sum", "max_prompt_tokens": 40}
    }
    small |= {"algo": {"batch_size": 2}, "rollout": {"n_samples": 3, "max_new_tokens": 5}}
    assert memory.micro_batch_tokens(footprint(folder, **small)) == 2 * (10 + 3 * 5)
    shared = footprint(folder, **small, train={"workers": 2})
    assert memory.micro_batch_tokens(shared) == 10 + 3 * 5
    cut = footprint(folder, **small, train={"max_tokens_per_mb": 8})
    assert memory.micro_batch_tokens(cut) == 40 + 5, "a longer sequence stands alone"


def test_a_micro_batch_of_given_answers_counts_them_as_long_as_prompts_may_be(folder):
    task = {"kind": "jsonl", "path": "rows.jsonl", "max_prompt_tokens": 40}
    sft = {"task": task, "algo": {"kind": "sft", "batch_size": 3}}
    assert memory.micro_batch_tokens(footprint(folder, **sft)) == 3 * (40 + 40)
    assert memory.in_flight(footprint(folder, **sft), evaluating=True) == (0, 0)
    for kind, answers in (("dpo", 2), ("kto", 1)):
        compared = footprint(folder, task=task, algo={"kind": kind, "batch_size": 3})
        assert memory.micro_batch_tokens(compared) == 3 * (40 + answers * 40)


@pytest.mark.parametrize(
    ("sections", "beside"),
    [
        ({}, False),
        ({"rollout": {"max_head_offpolicyness": 1}}, True),
        ({"adapters": 2}, True),
        ({"train": {"workers": 2}}, True),
    ],
)
def test_sampling_counts_beside_training_where_both_go_on(folder, sections, beside):
    phases = estimate_memory(footprint(folder, **sections))
    for part in ("decode copy", "KV cache"):
        assert (part in phases["training"]) == beside
        assert part in phases["sampling"]
    assert "activations" not in phases["sampling"]


def test_accelerators_hold_no_packed_copies_and_no_programs(folder):
    run = footprint(folder, on_cpu=False)
    phases = estimate_memory(run)
    assert set(phases) == {"sampling", "training"}
    assert memory.base_bytes(run) == 4 * run.base
    assert "programs" not in phases["training"]


def test_narrow_base_models_are_not_packed_and_adapters_stay_fp32(folder):
    whole, half = footprint(folder), footprint(folder, dtype="bfloat16")
    assert memory.base_bytes(half) == 2 * half.base
    phases = estimate_memory(half)
    assert phases["training"]["optimizer"] == estimate_memory(whole)["training"]["optimizer"]


def test_train_workers_hold_a_base_model_each(folder):
    one, two = footprint(folder), footprint(folder, train={"workers": 2})
    assert memory.base_bytes(two) == 3 * memory.base_bytes(one)
    assert total(estimate_memory(two), "training") > total(estimate_memory(one), "training")
    served = footprint(folder, train={"workers": 2}, rollout={"kind": "vllm"})
    assert memory.base_bytes(served) == 2 * memory.base_bytes(one), "the controller has none"


def test_device_is_the_one_that_torch_would_choose():
    assert has_accelerator() == (default_device().type != "cpu")
