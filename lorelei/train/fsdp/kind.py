"""What a run must know of the engine fsdp before it starts. No torch at import."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorelei.config.train import FsdpTrain
from lorelei.model.config import ModelInfo, ModelSizes
from lorelei.train.kind import (
    Amount,
    BaseModel,
    EngineSpec,
    RankShare,
    TrainKind,
    check_divides,
)

if TYPE_CHECKING:
    from lorelei.parallel.ranks import Ranks
    from lorelei.train.contract import TrainEngine

_GATHERED = 2  # FSDP gathers a block while it computes the one before


@dataclass(frozen=True, slots=True, kw_only=True)
class FsdpSpec(EngineSpec):
    """One of the ranks that hold a model together.

    Their number is a multiple of sequence_parallel * tensor_parallel; the quotient is the number
    of shares of a batch.
    """

    tensor_parallel: int = 1
    sequence_parallel: int = 1
    cpu_offload: bool = False


def _build(spec: FsdpSpec, ranks: Ranks) -> TrainEngine:
    from lorelei.model.backend import default_device
    from lorelei.train.fsdp.engine import fsdp_engine

    return fsdp_engine(spec, default_device(), ranks)


def _foreign_info(train: FsdpTrain, folder: Path) -> ModelInfo:
    from lorelei.train.fsdp.model_info import hosted_info

    return hosted_info(folder, train.tensor_parallel)


def _check(train: FsdpTrain, model: ModelSizes, hf_config: Mapping[str, Any]) -> None:
    for what, count in (("key/value heads", model.kv_heads), ("attention heads", model.heads)):
        check_divides("tensor_parallel", train.tensor_parallel, what, count)
    check_divides("sequence_parallel", train.sequence_parallel, "attention heads", model.heads)
    width = model.intermediate if model.moe is None else model.moe.intermediate
    check_divides("tensor_parallel", train.tensor_parallel, "MLP features", width)


def _shares(train: FsdpTrain, base: BaseModel) -> Sequence[RankShare]:
    return (RankShare(base=tuple(_base(train, base)), layers=base.sizes.layers),)


def _base(train: FsdpTrain, base: BaseModel) -> Iterator[Amount]:
    each, tensor, ends = base.item_bytes, train.tensor_parallel, base.ends
    shards = train.data_parallel * train.sequence_parallel
    counts = base.parameters
    block = sum(counts[p] for p in ("attention", "mlp", "routers", "norms") if p in counts)
    block //= base.sizes.layers
    split = f" / {tensor} tensor parallel" if tensor > 1 else ""
    held = f"{base.total:,} parameters"
    if tensor > 1:  # which leaves embedding and head whole
        held = f"({base.total - ends:,} parameters{split} + {ends:,} of embedding and head)"
    offloaded = train.cpu_offload and not base.on_cpu
    if offloaded:
        yield Amount("base model", 0, "kept in the CPU's memory: train.cpu_offload")
    else:
        yield Amount(
            "base model",
            ((base.total - ends) // tensor + ends) * each // shards,
            f"{held} x {each} bytes / {shards} shards",
        )
    if shards > 1 or offloaded:
        yield Amount(
            "gathered blocks",
            _GATHERED * block * each // tensor,
            f"{_GATHERED} blocks x {block:,} parameters x {each} bytes{split}: one is computed "
            "while the next arrives",
        )
        how = f"embedding and head: {ends:,} parameters x {each} bytes"
        yield Amount("gathered ends", ends * each, how)


KIND = TrainKind(
    config=FsdpTrain,
    spec=FsdpSpec,
    build=_build,
    shares=_shares,
    check=_check,
    foreign_info=_foreign_info,
)
