"""What one adapter travels to servers as. Runs inside servers too.

A Transport makes a payload, `Client.load` writes it to the wire and a worker opens it; everything
between passes it on. Packed, an adapter is safetensors with its shape in the metadata; modules that
share an A send it once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from lorelei.lora.peft_folder import read_peft_folder
from lorelei.lora.state import AdapterState
from lorelei.lora.tensor_file import lora_modules, parse_tensors, tensor_bytes
from lorelei.types import AdapterSpec

BYTES, FOLDER, BROADCAST = "bytes", "folder", "broadcast"  # kinds of payloads on the wire
_SPEC = "lorelei_spec"


@dataclass(frozen=True, slots=True)
class Payload:
    """What one adapter travels as."""

    kind: str
    # packed, or the path of a PEFT folder that the server reads too; after a broadcast, which has
    # left them in the workers' memory, the bytes are for servers that it did not reach
    data: bytes


def from_wire(kind: str, body: bytes) -> AdapterState:
    """The adapter, in a worker. body: of the request, or what the broadcast brought.

    Raises ValueError for what is not a whole adapter.
    """
    return read_peft_folder(Path(body.decode())) if kind == FOLDER else unpack(body)


def pack(state: AdapterState) -> bytes:
    """The bytes of an adapter."""
    first: dict[int, str] = {}  # a tensor, by id -> the first of its names
    same = {n: first.setdefault(id(t), n) for n, t in sorted(state.tensors.items())}
    spec = {
        "rank": state.spec.rank,
        "alpha": state.spec.alpha,
        "rslora": state.spec.rslora,
        "tied": {name: other for name, other in same.items() if name != other},
    }
    sent = {name: state.tensors[name] for name in first.values()}
    return tensor_bytes(sent, (_SPEC, json.dumps(spec)))


def unpack(data: bytes) -> AdapterState:
    """The adapter; its target_modules are the full names of the modules it has.

    Raises ValueError (CorruptFile is one) for anything but a whole LoRA adapter.
    """
    tensors, metadata = parse_tensors(data, Path("the adapter"))
    spec = json.loads(metadata.get(_SPEC, "null"))
    if not isinstance(spec, dict):
        raise ValueError(f"the adapter: its metadata has no {_SPEC}; send it with the same Lorelei")
    rank = int(spec["rank"])
    try:
        tensors |= {name: tensors[other] for name, other in spec["tied"].items()}
    except (KeyError, AttributeError) as missing:
        raise ValueError(f"the adapter: its shared tensors are incomplete: {missing}") from None
    tensors = dict(sorted(tensors.items()))
    return AdapterState(
        spec=AdapterSpec(
            rank=rank,
            alpha=float(spec["alpha"]),
            target_modules=lora_modules(tensors, rank),
            rslora=bool(spec["rslora"]),
        ),
        tensors=tensors,
    )
