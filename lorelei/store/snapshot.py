"""An adapter snapshot as one safetensors file: tensors, Adam's moments, spec and step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter
from torch import Tensor

from lorelei.lora.state import AdapterSnapshot, AdapterState
from lorelei.lora.tensor_file import check_floating, lora_modules, parse_tensors, tensor_bytes
from lorelei.store.durable import CorruptFile, read_file
from lorelei.store.record import FORMAT, json_object, migrate, parse_record
from lorelei.types import AdapterSpec

_METADATA = "lorelei"
_AVG, _AVG_SQ = "exp_avg.", "exp_avg_sq."


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    """What the file says beside its tensors."""

    format: int
    spec: AdapterSpec
    step: int


_HEADER = TypeAdapter(_Header)


def snapshot_bytes(snapshot: AdapterSnapshot) -> bytes:
    """Equal snapshots give equal bytes. Raises ValueError for one that `read_snapshot` refuses."""
    _check(snapshot)
    header = {"format": FORMAT, "spec": asdict(snapshot.state.spec), "step": snapshot.step}
    tensors = {
        **snapshot.state.tensors,
        **{_AVG + name: tensor for name, tensor in snapshot.exp_avg.items()},
        **{_AVG_SQ + name: tensor for name, tensor in snapshot.exp_avg_sq.items()},
    }
    return tensor_bytes(tensors, (_METADATA, json.dumps(header, sort_keys=True)))


def read_snapshot(path: Path, sha256: str | None) -> AdapterSnapshot:
    """Read and check a snapshot; `sha256` of the whole file, None: not known.

    Raises CorruptFile naming the file.
    """
    data = read_file(path)
    if sha256 is not None and (actual := hashlib.sha256(data).hexdigest()) != sha256:
        raise CorruptFile(f"{path}: damaged: sha256 is {actual[:12]}…, must be {sha256[:12]}…")
    tensors, metadata = parse_tensors(data, path)
    body = json_object(metadata.get(_METADATA, "{}"), path)
    header = parse_record(_HEADER, migrate(body, path), path)
    own = {n: t for n, t in tensors.items() if not n.startswith((_AVG, _AVG_SQ))}
    snapshot = AdapterSnapshot(
        state=AdapterState(spec=header.spec, tensors=own),
        exp_avg=_part(tensors, _AVG),
        exp_avg_sq=_part(tensors, _AVG_SQ),
        step=header.step,
    )
    try:
        _check(snapshot)
    except ValueError as error:
        raise CorruptFile(f"{path}: {error}") from error
    return snapshot


def _check(snapshot: AdapterSnapshot) -> None:
    tensors = snapshot.state.tensors
    if snapshot.state.spec.full:
        check_floating(tensors)
    else:
        lora_modules(tensors, snapshot.state.spec.rank)
    if snapshot.step < 0:
        raise ValueError(f"step is {snapshot.step}, must be 0 or more")
    for prefix, moments in ((_AVG, snapshot.exp_avg), (_AVG_SQ, snapshot.exp_avg_sq)):
        if odd := sorted(moments.keys() ^ tensors.keys()):
            raise ValueError(f"{prefix[:-1]} does not have the adapter's tensors: {odd[0]}")
        for name, moment in moments.items():
            if moment.shape != tensors[name].shape or not moment.dtype.is_floating_point:
                raise ValueError(
                    f"tensor {prefix}{name} is {list(moment.shape)} {moment.dtype}, "
                    f"must be {list(tensors[name].shape)} floating point"
                )


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
