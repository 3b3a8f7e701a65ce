"""One adapter as bytes: what travels to servers by HTTP and by broadcast. Runs inside servers too.

Safetensors with the adapter's shape in its metadata. Modules that share an A send it once.
"""

from __future__ import annotations

import json
from pathlib import Path

from lorelei.lora.state import AdapterState
from lorelei.lora.tensor_file import lora_modules, parse_tensors, tensor_bytes
from lorelei.types import AdapterSpec

_SPEC = "lorelei_spec"


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
