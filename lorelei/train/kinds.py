"""Every train engine, by `train.kind`. No torch at import."""

from __future__ import annotations

from collections.abc import Mapping

from lorelei.config.run import RunConfig
from lorelei.train.archon import kind as archon
from lorelei.train.fsdp import kind as fsdp
from lorelei.train.kind import TrainKind
from lorelei.train.megatron import kind as megatron

TRAIN: Mapping[str, TrainKind] = {
    "archon": archon.KIND,
    "fsdp": fsdp.KIND,
    "megatron": megatron.KIND,
}


def trains_here(config: RunConfig) -> bool:
    """Whether the train engine is one of the controller's process, which then needs a decoder."""
    here = TRAIN[config.train.kind].here
    return here is not None and config.train.workers == 1 and config.cluster.kind == "local"
