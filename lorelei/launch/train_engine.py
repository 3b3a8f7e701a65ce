"""The train engine of a run, in this process or behind workers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lorelei.config.run import RunConfig
from lorelei.config.train import ArchonTrain, FsdpTrain, MegatronTrain
from lorelei.model.decoder import Decoder
from lorelei.train.archon.engine import archon_engine
from lorelei.train.contract import TrainEngine
from lorelei.train.remote.engine import RemoteEngine
from lorelei.train.remote.restarting import Restarting
from lorelei.train.remote.spec import ArchonSpec, EngineSpec, FsdpSpec, MegatronSpec
from lorelei.train.remote.workers import Launcher, LocalWorkers
from lorelei.venvs.recipe import interpreter

if TYPE_CHECKING:
    from lorelei.launch.ray_cluster import Cluster


def trains_here(config: RunConfig) -> bool:
    """Whether the train engine is one of this process, which then needs a decoder."""
    train = config.train
    return isinstance(train, ArchonTrain) and train.workers == 1 and config.cluster.kind == "local"


def make_train_engine(
    config: RunConfig, folder: Path, decoder: Decoder | None, cluster: Cluster | None
) -> TrainEngine:
    """folder: of the model. decoder: for an engine in this process."""
    train = config.train
    if trains_here(config):
        assert decoder is not None, "loaded for it"
        return archon_engine(decoder, train.max_tokens_per_mb, train.gradient_checkpointing)
    launcher: Launcher = LocalWorkers if cluster is None else cluster.launch_workers
    spec, python = _spec(config, folder), _python(config)
    return Restarting(
        lambda: RemoteEngine(spec, train.workers, python, launcher=launcher),
        config.cluster.restarts,
    )


def _python(config: RunConfig) -> str:
    return str(interpreter("megatron")) if config.train.kind == "megatron" else sys.executable


def _spec(config: RunConfig, folder: Path) -> EngineSpec:
    match config.train:
        case ArchonTrain() as train:
            return ArchonSpec(
                model=str(folder),
                dtype=config.dtype,
                max_tokens_per_mb=train.max_tokens_per_mb,
                recompute=train.gradient_checkpointing,
            )
        case FsdpTrain() as train:
            return FsdpSpec(
                model=str(folder),
                dtype=config.dtype,
                max_tokens_per_mb=train.max_tokens_per_mb,
                recompute=train.gradient_checkpointing,
                tensor_parallel=train.tensor_parallel,
                sequence_parallel=train.sequence_parallel,
                cpu_offload=train.cpu_offload,
            )
        case MegatronTrain() as train:
            return MegatronSpec(
                model=str(folder),
                dtype=config.dtype,
                max_tokens_per_mb=train.max_tokens_per_mb,
                recompute=train.gradient_checkpointing,
                tensor_parallel=train.tensor_parallel,
                pipeline_parallel=train.pipeline_parallel,
                context_parallel=train.context_parallel,
                expert_parallel=train.expert_parallel,
                expert_tensor_parallel=train.expert_tensor_parallel,
                sequence_parallel=train.sequence_parallel,
                distributed_optimizer=train.distributed_optimizer,
            )
