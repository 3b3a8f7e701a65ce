"""What travels between a controller and its workers arrives as it was, or not at all."""

from __future__ import annotations

import socket
from dataclasses import replace

import numpy as np
import pytest
import torch

from lorelei.lora.state import AdapterSnapshot, AdapterState
from lorelei.train.remote.wire import Call, Failure, WireError, decode, encode, receive, send
from lorelei.types import AdamHyper, AdapterSpec, ItemOutputs, LossSpec, OptimStats, TrainOutputs
from tests.episodes import random_group, weighted_batch


def through(value: object) -> object:
    here, there = socket.socketpair()
    with here, there:
        send(here, value)
        return receive(there)


def split(frame: bytes) -> tuple[bytes, bytes]:
    size = int.from_bytes(frame[:8], "little")
    return frame[16 : 16 + size], frame[16 + size :]


def test_a_batch_arrives_as_it_was() -> None:
    rng = np.random.default_rng(0)
    batch = weighted_batch("a", [random_group(rng, 4, [3, 1]), random_group(rng, 2, [5, 2])])
    lacking = np.full(len(batch.items), np.nan, dtype=np.float32)
    streams = {**batch.items.streams, "teacher": lacking}
    batch = replace(batch, items=replace(batch.items, streams=streams))
    got = through(Call(method="logprobs", args=(batch, "current")))
    assert isinstance(got, Call) and got.args[1] == "current"
    found = got.args[0]
    assert len(found.segments) == len(batch.segments)
    for one, other in zip(found.segments, batch.segments, strict=True):
        assert (one.parent, one.start, one.adapter) == (other.parent, other.start, other.adapter)
        assert one.tokens.dtype == np.int32
        np.testing.assert_array_equal(one.tokens, other.tokens)
    for name in ("source", "target", "weight", "temperature", "sequence"):
        np.testing.assert_array_equal(getattr(found.items, name), getattr(batch.items, name))
    assert found.items.streams.keys() == streams.keys()
    for name, values in streams.items():
        np.testing.assert_array_equal(found.items.streams[name], values)
        assert found.items.streams[name].dtype == values.dtype


def test_a_snapshot_arrives_bit_for_bit_with_its_spec() -> None:
    spec = AdapterSpec(rank=2, alpha=4, target_modules=("q_proj", "v_proj"))
    shared = torch.randn(2, 3)
    tensors = {"x": shared, "y": shared, "z": torch.randn(3, 2).T, "w": torch.ones(2).bfloat16()}
    snapshot = AdapterSnapshot(
        state=AdapterState(spec=spec, tensors=tensors), exp_avg=tensors, exp_avg_sq={}, step=7
    )
    got = through(snapshot)
    assert isinstance(got, AdapterSnapshot)
    assert got.state.spec == spec and got.step == 7 and got.exp_avg_sq == {}
    for name, tensor in tensors.items():
        assert got.state.tensors[name].dtype == tensor.dtype
        assert torch.equal(got.state.tensors[name], tensor)


def test_a_tensor_with_two_names_is_sent_once_and_shared_again() -> None:
    shared = torch.randn(64, 64)
    spec = AdapterSpec(rank=2, alpha=4)
    tied, apart = (
        AdapterState(spec=spec, tensors={"x": shared, "y": other})
        for other in (shared, shared.clone())
    )
    assert len(encode(apart)) - len(encode(tied)) > shared.nbytes - 256
    got = through(tied)
    assert isinstance(got, AdapterState)
    assert got.tensors["x"] is got.tensors["y"] and torch.equal(got.tensors["x"], shared)


@pytest.mark.parametrize(
    "value",
    [
        Failure(kind="ValueError", text="größer"),
        {"a": AdamHyper(lr=1e-3), "b": AdamHyper(lr=2e-3, eps=1e-5)},
        {"a": LossSpec(path="x:y", params={"eps": 0.2, "on": True, "off": None, "how": "so"})},
        {"a": OptimStats(grad_norm=0.5, step=3)},
        (1, None, ("x", (2.5,)), {}),
    ],
)
def test_plain_values_arrive_equal(value: object) -> None:
    assert through(value) == value


def test_outputs_keep_their_precision() -> None:
    items = ItemOutputs(logprobs=np.array([-1.1, -2.2]), entropy=np.array([0.5, 0.25]))
    got = through(TrainOutputs(items=items, loss={"a": 0.1}, metrics={"a": {"clipped": 0.2}}))
    assert isinstance(got, TrainOutputs)
    assert got.items.logprobs.dtype == np.float64
    np.testing.assert_array_equal(got.items.logprobs, items.logprobs)
    assert got.loss == {"a": 0.1} and got.metrics == {"a": {"clipped": 0.2}}


@pytest.mark.parametrize("value", [object(), {1, 2}, print, b"bytes", Exception("x")])
def test_what_is_not_on_the_list_cannot_travel(value: object) -> None:
    with pytest.raises(WireError, match="cannot travel"):
        encode(Call(method="add_adapter", args=(value,)))


def test_a_damaged_frame_is_refused() -> None:
    frame = encode(Call(method="x", args=(torch.ones(2, 3),)))
    header, body = split(frame)
    with pytest.raises(WireError, match="damaged"):
        decode(header, body[:-1])
    with pytest.raises(WireError, match="damaged"):
        decode(header[:-1], body)
    with pytest.raises(WireError, match="damaged"):  # a class that must not be made
        decode(header.replace(b"Call", b"Popen"[:4]), body)


def test_tensors_that_are_not_those_of_the_header_are_refused() -> None:
    header, _ = split(encode(Call(method="x", args=(torch.ones(2, 3),))))
    for other in (torch.ones(3, 2), torch.ones(2, 3, dtype=torch.float64)):
        _, body = split(encode(Call(method="x", args=(other,))))
        with pytest.raises(WireError, match="its header says"):
            decode(header, body)
    _, body = split(encode(Call(method="x", args=(torch.ones(2, 3), torch.ones(1)))))
    with pytest.raises(WireError, match="does not name"):
        decode(header, body)


def test_a_closed_channel_is_an_end_of_file() -> None:
    here, there = socket.socketpair()
    with there:
        here.close()
        with pytest.raises(EOFError):
            receive(there)
