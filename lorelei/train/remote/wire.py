"""Messages between a controller and its workers: plain values as msgpack, tensors as safetensors.

A frame is the lengths of its two parts, then the parts. Only the dataclasses below can travel;
sequences arrive as tuples. Nothing is pickled.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import msgpack
import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from lorelei.lora.state import AdapterSnapshot, AdapterState
from lorelei.train.kind import EngineSpec
from lorelei.train.kinds import TRAIN
from lorelei.types import (
    AdamHyper,
    AdapterSpec,
    Batch,
    ItemOutputs,
    Items,
    LossSpec,
    OptimStats,
    Segment,
    TrainOutputs,
)

NETWORK = "Network"  # the kind of failures in which another rank was out of reach
_LENGTHS = struct.Struct("<QQ")


class WireError(RuntimeError):
    """A frame is not what was agreed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The first message to a worker."""

    spec: EngineSpec
    timeout: float  # seconds that a collective call may take


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A method of TrainEngine with its arguments."""

    method: str
    args: tuple[Any, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a call returned; None from every rank but the first."""

    value: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What a call raised."""

    kind: str  # ValueError, KeyError, RankFailed, NETWORK, or the name of an internal error
    text: str


_TRAVEL = {
    kind.__name__: kind
    for kind in (
        *(Start, Call, Reply, Failure, *(engine.spec for engine in TRAIN.values())),
        *(AdapterSpec, AdapterState, AdapterSnapshot, AdamHyper, LossSpec),
        *(Batch, Segment, Items, ItemOutputs, TrainOutputs, OptimStats),
    )
}


def encode(value: Any) -> bytes:
    """A frame; a tensor that stands in several places, a tied A, is sent once.

    Raises WireError for a value that cannot travel.
    """
    tensors = _Tensors({}, {})
    header = bytes(msgpack.packb(_plain(value, tensors)) or b"")  # typed as if it may be None
    body = safetensors.torch.save(tensors.by_key)
    return _LENGTHS.pack(len(header), len(body)) + header + body


def decode(header: bytes, body: bytes) -> Any:
    """The value of a frame's two parts. Raises WireError unless they fit each other."""
    try:
        tensors = safetensors.torch.load(body)
        named: set[str] = set()
        value = _value(msgpack.unpackb(header, use_list=False), tensors, named)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise WireError(f"a damaged frame: {type(error).__name__}: {error}") from error
    if unnamed := sorted(tensors.keys() - named):
        raise WireError(f"a frame has tensors that its header does not name: {unnamed}")
    return value


def send(channel: socket.socket, value: Any) -> None:
    """Write one frame."""
    channel.sendall(encode(value))


def receive(channel: socket.socket) -> Any:
    """Read one frame's value. Raises EOFError when the other side is gone."""
    return parse(read_frame(channel))


def read_frame(channel: socket.socket) -> bytes:
    """Read one frame as it is. Raises EOFError when the other side is gone."""
    lengths = _read(channel, _LENGTHS.size)
    return lengths + _read(channel, sum(_LENGTHS.unpack(lengths)))


def parse(frame: bytes) -> Any:
    """The value of a frame. Raises WireError."""
    header, body = _LENGTHS.unpack_from(frame)
    if len(frame) != _LENGTHS.size + header + body:
        raise WireError(f"a frame of {len(frame)} bytes is not as long as it says")
    split = _LENGTHS.size + header
    return decode(frame[_LENGTHS.size : split], frame[split:])


def _read(channel: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view = memoryview(data)
    while len(view):
        count = channel.recv_into(view)
        if count == 0:
            raise EOFError("the other side closed the connection")
        view = view[count:]
    return bytes(data)


@dataclass(frozen=True, slots=True)
class _Tensors:
    """The tensors of a frame, and the keys of those that are in it already."""

    by_key: dict[str, Tensor]
    key_of: dict[int, str]  # by id: the value that is encoded holds them all

    def keep(self, source: object, tensor: Tensor) -> tuple[str, str, list[int]]:
        """Take a tensor that was made of `source`; what the header says of it."""
        key = self.key_of.setdefault(id(source), str(len(self.by_key)))
        self.by_key.setdefault(key, tensor)
        return key, str(tensor.dtype), list(tensor.shape)


def _plain(value: Any, tensors: _Tensors) -> Any:
    """Every msgpack map has one entry, whose key says what it stands for."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Tensor():
            # a copy: safetensors refuses views and tensors that share memory
            held = value.detach().to("cpu").clone(memory_format=torch.contiguous_format)
            return {"tensor": tensors.keep(value, held)}
        case np.ndarray():
            held = torch.from_numpy(np.array(value, order="C"))
            return {"array": tensors.keep(value, held)}
        case Mapping():
            return {"map": [(str(k), _plain(v, tensors)) for k, v in value.items()]}
        case list() | tuple():
            return [_plain(v, tensors) for v in value]
        case _ if is_dataclass(value) and _TRAVEL.get(type(value).__name__) is type(value):
            named = {f.name: _plain(getattr(value, f.name), tensors) for f in fields(value)}
            return {type(value).__name__: list(named.items())}
    raise WireError(f"a {type(value).__name__} cannot travel to a worker")


def _value(plain: Any, tensors: dict[str, Tensor], named: set[str]) -> Any:
    if isinstance(plain, tuple):
        return tuple(_value(v, tensors, named) for v in plain)
    if not isinstance(plain, dict):
        return plain
    ((kind, content),) = plain.items()
    match kind:
        case "tensor":
            return _taken(content, tensors, named)
        case "array":
            return _taken(content, tensors, named).numpy()
        case "map":
            return {k: _value(v, tensors, named) for k, v in content}
        case _:
            return _TRAVEL[kind](**{k: _value(v, tensors, named) for k, v in content})


def _taken(
    content: tuple[str, str, tuple[int, ...]], tensors: dict[str, Tensor], named: set[str]
) -> Tensor:
    key, dtype, shape = content
    tensor = tensors[key]
    named.add(key)
    if str(tensor.dtype) != dtype or tuple(tensor.shape) != tuple(shape):
        raise WireError(
            f"tensor {key} is {tensor.dtype} {list(tensor.shape)}, its header says "
            f"{dtype} {list(shape)}"
        )
    return tensor
