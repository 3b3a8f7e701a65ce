"""The train engine of a run, in this process or behind workers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

from lorelei.config.run import RunConfig
from lorelei.model.decoder import Decoder
from lorelei.train.contract import TrainEngine
from lorelei.train.kinds import TRAIN, trains_here
from lorelei.train.remote.engine import RemoteEngine
from lorelei.train.remote.restarting import Restarting
from lorelei.train.remote.workers import Launcher, LocalWorkers
from lorelei.venvs.recipe import interpreter

if TYPE_CHECKING:
    from lorelei.launch.ray_cluster import Cluster


def make_train_engine(
    config: RunConfig, folder: Path, decoder: Decoder | None, cluster: Cluster | None
) -> TrainEngine:
    """folder: of the model. decoder: for an engine in this process; None: in workers."""
    train = config.train
    kind = TRAIN[train.kind]
    if kind.here is not None and trains_here(config):
        assert decoder is not None, "loaded for it"
        return kind.here(train, decoder)
    launcher: Launcher = LocalWorkers if cluster is None else cluster.launch_workers
    spec = kind.make_spec(train, folder, config.dtype)
    python = sys.executable if kind.venv is None else str(interpreter(kind.venv))

    # casts: both have the protocol's calls, but only at run time (see remote.forwarding)
    def make() -> TrainEngine:
        return cast(TrainEngine, RemoteEngine(spec, train.workers, python, launcher=launcher))

    return cast(TrainEngine, Restarting(make, config.cluster.restarts))
