"""An adapter as bytes: whole on the other side, and nothing in it twice."""

from __future__ import annotations

import json

import pytest
import torch

from lorelei.inference.server.payload import pack, unpack
from lorelei.lora.state import AdapterState, tensor_names
from lorelei.lora.tensor_file import tensor_bytes
from lorelei.types import AdapterSpec

RANK, HIDDEN = 16, 576
SPEC = AdapterSpec(rank=RANK, alpha=32, target_modules=("linear_qkv", "linear_fc1"))


def fused_state() -> AdapterState:
    """q, k and v share one A, and so do gate and up."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(4):
        at = f"model.layers.{layer}"
        for leaves in (("self_attn.q_proj", "self_attn.k_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            shared = torch.randn(RANK, HIDDEN, generator=generator)
            for leaf in leaves:
                a, b = tensor_names(f"{at}.{leaf}")
                tensors |= {a: shared, b: torch.randn(HIDDEN, RANK, generator=generator)}
    return AdapterState(spec=SPEC, tensors=dict(sorted(tensors.items())))


def test_an_adapter_arrives_as_it_was_and_a_shared_a_once() -> None:
    state = fused_state()
    data = pack(state)
    unique = sum(t.nbytes for t in {id(t): t for t in state.tensors.values()}.values())
    assert len(data) <= 1.05 * unique
    got = unpack(data)
    assert got.digest() == state.digest() and got.spec.rank == RANK
    apart = AdapterState(spec=SPEC, tensors={n: t.clone() for n, t in state.tensors.items()})
    assert len(pack(apart)) > 1.2 * len(data)
    assert unpack(pack(apart)).digest() == state.digest()


def test_a_shared_tensor_that_is_not_there_is_refused() -> None:
    spec = {"rank": 1, "alpha": 1.0, "rslora": False, "tied": {"x": "nowhere"}}
    data = tensor_bytes({"y": torch.ones(1, 2)}, ("lorelei_spec", json.dumps(spec)))
    with pytest.raises(ValueError, match="its shared tensors are incomplete: 'nowhere'"):
        unpack(data)
