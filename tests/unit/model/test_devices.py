"""Nothing of a pass mixes devices: a model on a fake accelerator, its arithmetic left out.

torch's fake cuda has no autograd without CUDA, so the fake device is `meta`; the kernels are those
of CUDA. Tensors that stay on the CPU fail the test where an operation reads them beside others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig

from lorelei.inference.embedded.attention import PrefillAttention, PromptRows, StepAttention
from lorelei.inference.embedded.kv_cache import PromptCache, RowCache
from lorelei.inference.embedded.route import PublishedRoute, RoutedSpan, low_rank
from lorelei.inference.embedded.sampler import RowParams, sample
from lorelei.lora.bank import AdapterBank
from lorelei.model import attention
from lorelei.model.attention import PackedAttention, tree_blocks
from lorelei.model.config import DecoderConfig
from lorelei.model.decoder import Decoder
from lorelei.model.head import target_logprobs
from lorelei.model.load import Checkpoint, build_decoder
from lorelei.types import AdapterSpec, SamplingParams
from tests.tiny_models import tiny_config

ACCELERATOR = torch.device("meta")
SPECS = {
    "a": AdapterSpec(rank=4, alpha=8),
    "b": AdapterSpec(rank=2, alpha=8, target_modules=("q_proj", "down_proj")),
}
LENGTHS, PARENTS = [6, 3, 5, 4], [-1, 0, 0, -1]
COPIES = ("aten::_to_copy", "aten::copy_")


class OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of two devices, copies apart; reads any value as 9."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 9  # the largest position, for one
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()]
        devices = {x.device.type for x in tensors}
        assert len(devices) < 2 or func.name() in COPIES, f"{func.name()} reads {devices}"
        return func(*args, **(kwargs or {}))


class Shapes(Mapping[str, Tensor]):
    """A checkpoint's tensors by name, without values."""

    def __init__(self, family: str) -> None:
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(one_layer(family))
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}

    def __getitem__(self, name: str) -> Tensor:
        return torch.empty(self._shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def one_layer(family: str) -> PreTrainedConfig:
    """Layers are alike, and a fake operation takes a millisecond."""
    return tiny_config(family, num_hidden_layers=1)


@contextmanager
def fake_accelerator() -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=True), OneDevice():
        yield


def fake_decoder(tensors: Shapes, family: str, dtype: torch.dtype) -> Decoder:
    config = DecoderConfig.from_hf(one_layer(family).to_dict() | {"architectures": None})
    return build_decoder(config, Checkpoint(tensors, Path(), dtype, ACCELERATOR))


@pytest.fixture(params=["flash", "plain"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """bf16 through CUDA's kernels, and fp32 through the products of devices without them."""
    monkeypatch.setattr(attention, "flashes", lambda x: x.dtype == torch.bfloat16)
    return torch.bfloat16 if request.param == "flash" else torch.float32


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["qwen3"])
def test_a_training_pass_stays_on_the_device(
    family: str, recompute: bool, dtype: torch.dtype
) -> None:
    tensors = Shapes(family)
    with fake_accelerator():
        bank = AdapterBank(fake_decoder(tensors, family, dtype))
        for name, spec in SPECS.items():
            bank.add(name, spec)
        decoder, route = bank.model(list(zip("aaab", LENGTHS, strict=True)), dropout_seed=1)
        tokens = torch.zeros(sum(LENGTHS), dtype=torch.long, device=ACCELERATOR)
        hidden = decoder(
            tokens, tokens, route, PackedAttention(tree_blocks(LENGTHS, PARENTS)), recompute
        )
        temperature = torch.ones(len(tokens), device=ACCELERATOR)
        logprobs, entropy = target_logprobs(hidden, decoder.head, tokens, temperature)
        logprobs.sum().backward()
        for name in SPECS:
            for tensor_name, tensor in bank[name].tensors().items():
                assert tensor.dtype == torch.float32, tensor_name
                assert tensor.grad is not None and tensor.grad.device == ACCELERATOR, tensor_name
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert logprobs.device == ACCELERATOR


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("family", ["qwen3"])
@torch.no_grad()
def test_prefill_and_a_decoding_step_stay_on_the_device(
    family: str, merged: bool, dtype: torch.dtype
) -> None:
    tensors = Shapes(family)
    with fake_accelerator():
        decoder = fake_decoder(tensors, family, dtype)
        bank = AdapterBank(decoder)
        adapter = bank.add("b", SPECS["b"])
        published = low_rank(adapter, decoder.dtype)
        prompts, rows = [7, 5], 3  # two rows of the first, one of the second
        caches = [PromptCache(decoder, length) for length in prompts]

        def route(tokens: int) -> Any:
            if merged:
                return bank.merged("b")
            return PublishedRoute([RoutedSpan(1, tokens, published)])

        tokens = torch.zeros(sum(prompts), dtype=torch.long, device=ACCELERATOR)
        decoder(tokens, tokens, route(12), PrefillAttention(prompts, caches))
        cache = RowCache(decoder)
        cache.reserve(rows, 4)
        groups = [PromptRows(0, 2, caches[0]), PromptRows(2, 3, caches[1])]
        lengths = torch.tensor([3, 1, 2], device=ACCELERATOR)
        for slots in (None, torch.tensor([2, 0, 1], device=ACCELERATOR)):
            attend = StepAttention(cache, groups, slots, lengths, 3)
            hidden = decoder(lengths, lengths, route(rows), attend)
            logits = route(rows)(decoder.head, hidden)
            params = [SamplingParams(temperature=t) for t in (1.0, 0.7, 0.0)]
            chosen, logprobs = sample(
                logits, RowParams.of(params, ACCELERATOR), np.array([0.1, 0.5, 0.9])
            )
        assert chosen.device == logprobs.device == ACCELERATOR
        assert logprobs.dtype == torch.float32


def test_a_tensor_left_on_the_cpu_is_noticed() -> None:
    with fake_accelerator():
        table, index = torch.empty(9, 4), torch.zeros(3, dtype=torch.long, device=ACCELERATOR)
        with pytest.raises(AssertionError, match="index"):
            table[index]
