"""Snapshot files: bit-exact, and checked when read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from lorelei.lora.state import AdapterSnapshot, AdapterState, tensor_names
from lorelei.store.durable import CorruptFile, StoreError
from lorelei.store.snapshot import read_snapshot, snapshot_bytes
from lorelei.types import FULL_WEIGHTS, AdapterSpec

SPEC = AdapterSpec(rank=2, alpha=3.5, target_modules=("q_proj",), rslora=True, dropout=0.1)
A, B = tensor_names("model.layers.0.mlp.experts.3.gate_proj")


def snapshot(dtype: torch.dtype = torch.float32) -> AdapterSnapshot:
    rng = torch.Generator().manual_seed(0)
    shapes = {A: (2, 5), B: (4, 2)}
    tensors = {n: torch.randn(s, generator=rng).to(dtype) for n, s in shapes.items()}
    tensors[A][0, 0], tensors[A][0, 1] = float("nan"), float("-inf")
    moments = {n: torch.rand(s, generator=rng) for n, s in shapes.items()}
    squares = {n: moment**2 for n, moment in moments.items()}
    state = AdapterState(spec=SPEC, tensors=tensors)
    return AdapterSnapshot(state=state, exp_avg=moments, exp_avg_sq=squares, step=17)


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.numpy(force=True).tobytes() == other.numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_snapshot_round_trip_is_bit_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    path, want = tmp_path / "s.safetensors", snapshot(dtype)
    data = snapshot_bytes(want)
    path.write_bytes(data)
    got = read_snapshot(path, hashlib.sha256(data).hexdigest())
    assert (got.state.spec, got.step) == (SPEC, 17)
    assert list(got.state.tensors) == sorted(want.state.tensors)
    assert got.state.digest() == want.state.digest()
    for part in ("exp_avg", "exp_avg_sq"):
        assert getattr(got, part).keys() == {A, B}
        for name, tensor in getattr(got, part).items():
            assert same_bits(tensor, getattr(want, part)[name])
    assert snapshot_bytes(got) == data


def test_modules_that_share_one_a_can_be_written(tmp_path: Path) -> None:
    path, spec = tmp_path / "s.safetensors", AdapterSpec(rank=2, alpha=2.0)
    shared = torch.ones(2, 3)
    tensors = {}
    for module in ("gate_proj", "up_proj"):
        a, b = tensor_names(module)
        tensors |= {a: shared, b: torch.ones(4, 2).T.contiguous().T}
    state = AdapterState(spec=spec, tensors=tensors)
    path.write_bytes(
        snapshot_bytes(AdapterSnapshot(state=state, exp_avg=tensors, exp_avg_sq=tensors, step=0))
    )
    got = read_snapshot(path, None)
    assert all(torch.equal(got.state.tensors[name], tensors[name]) for name in tensors)


def test_full_weights_have_the_names_of_the_checkpoint(tmp_path: Path) -> None:
    path, fused = tmp_path / "s.safetensors", torch.arange(12.0).view(4, 3)
    tensors = {"model.norm.weight": torch.ones(3), "k": fused[2:], "q": fused[:2]}  # views
    state = AdapterState(spec=FULL_WEIGHTS, tensors=tensors)
    want = AdapterSnapshot(state=state, exp_avg=tensors, exp_avg_sq=tensors, step=1)
    path.write_bytes(snapshot_bytes(want))
    got = read_snapshot(path, None)
    assert got.state.spec == FULL_WEIGHTS and got.state.spec.full
    assert got.state.digest() == state.digest()
    assert all(torch.equal(got.exp_avg[name], tensor) for name, tensor in tensors.items())
    empty = AdapterState(spec=FULL_WEIGHTS, tensors={})
    with pytest.raises(ValueError, match="no tensors"):
        snapshot_bytes(AdapterSnapshot(state=empty, exp_avg={}, exp_avg_sq={}, step=0))


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    data = snapshot_bytes(snapshot())
    sha256 = hashlib.sha256(data).hexdigest()
    for offset in range(0, len(data), 7):
        path.write_bytes(data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :])
        with pytest.raises(CorruptFile, match=r"s\.safetensors: damaged"):
            read_snapshot(path, sha256)


def test_missing_snapshot_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorruptFile, match=r"s\.safetensors: missing"):
        read_snapshot(tmp_path / "s.safetensors", None)


RunComponents = tuple[dict[str, Tensor], dict[str, object]]


def _without(name: str) -> Callable[[RunComponents], None]:
    return lambda parts: parts[0].__delitem__(name)


def _with(name: str, tensor: Tensor) -> Callable[[RunComponents], None]:
    return lambda parts: parts[0].__setitem__(name, tensor)


def _header(**fields: object) -> Callable[[RunComponents], None]:
    return lambda parts: parts[1].update(fields)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without(B), f"tensor {B} is missing"),
        (_without("exp_avg." + A), f"exp_avg does not have the adapter's tensors: {A}"),
        (_with("exp_avg_sq.x", torch.ones(1)), "exp_avg_sq does not have"),
        (_with(A, torch.ones(3, 5)), r"has shape \[3, 5\], must be \[2, in\]"),
        (_with(A, torch.ones(2, 5, dtype=torch.int32)), "must be floating point"),
        (_with("exp_avg." + A, torch.ones(2, 4)), r"is \[2, 4\] torch.float32, must be \[2, 5\]"),
        (_with("model.embed.weight", torch.ones(1)), "model.embed.weight is not one of"),
        (_header(step="3"), "step: Input should be a valid integer"),
        (_header(step=-1), "step is -1"),
        (_header(spec={"rank": 2}), r"spec.alpha: Field required"),
        (_header(format=None), "format: None is not a number"),
        (_header(format=99), "format 99 is newer than 2"),
    ],
)
def test_file_that_is_no_sound_snapshot_is_refused(
    tmp_path: Path, damage: Callable[[RunComponents], None], message: str
) -> None:
    path = tmp_path / "s.safetensors"
    data = snapshot_bytes(snapshot())
    size = int.from_bytes(data[:8], "little")
    header = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["lorelei"])
    parts = (safetensors.torch.load(data), header)
    damage(parts)
    path.write_bytes(safetensors.torch.save(parts[0], {"lorelei": json.dumps(parts[1])}))
    with pytest.raises(StoreError, match=message) as caught:
        read_snapshot(path, None)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"\xff" * 64, b"[]", snapshot_bytes(snapshot())[:-1]])
def test_bytes_that_are_no_safetensors_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "s.safetensors"
    path.write_bytes(data)
    with pytest.raises(CorruptFile, match="not a readable safetensors file"):
        read_snapshot(path, None)


def test_snapshot_that_could_not_be_read_back_is_not_written() -> None:
    good = snapshot()
    bad = AdapterSnapshot(state=good.state, exp_avg={}, exp_avg_sq=good.exp_avg_sq, step=1)
    with pytest.raises(ValueError, match="exp_avg does not have"):
        snapshot_bytes(bad)
