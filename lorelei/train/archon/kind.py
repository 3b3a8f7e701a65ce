"""What a run must know of the engine archon before it starts. No torch at import."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorelei.config.train import ArchonTrain
from lorelei.model.config import ModelSizes
from lorelei.train.kind import Amount, BaseModel, EngineSpec, RankShare, TrainKind

if TYPE_CHECKING:
    from lorelei.model.decoder import Decoder
    from lorelei.parallel.ranks import Ranks
    from lorelei.train.contract import TrainEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchonSpec(EngineSpec):
    """One of several data-parallel ranks."""


def _build(spec: ArchonSpec, ranks: Ranks) -> TrainEngine:
    from lorelei.model.backend import DTYPES, default_device
    from lorelei.model.load import load_decoder
    from lorelei.train.archon.engine import archon_engine

    decoder = load_decoder(Path(spec.model), DTYPES[spec.dtype], default_device())
    return archon_engine(decoder, spec.max_tokens_per_mb, spec.recompute, ranks)


def _here(train: ArchonTrain, decoder: Decoder) -> TrainEngine:
    from lorelei.train.archon.engine import archon_engine

    return archon_engine(decoder, train.max_tokens_per_mb, train.gradient_checkpointing)


def _shares(train: ArchonTrain, base: BaseModel) -> Sequence[RankShare]:
    how = f"{base.total:,} parameters x {base.item_bytes} bytes; every rank has its own"
    held = Amount("base model", base.total * base.item_bytes, how)
    return (RankShare(base=(held,), layers=base.sizes.layers),)


def _check(train: ArchonTrain, model: ModelSizes, hf_config: Mapping[str, Any]) -> None:
    """Whatever our decoder builds can be trained."""


KIND = TrainKind(
    config=ArchonTrain, spec=ArchonSpec, build=_build, shares=_shares, check=_check, here=_here
)
