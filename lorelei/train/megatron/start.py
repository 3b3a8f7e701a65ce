"""From a spec to an engine: imports Megatron on any machine, then builds."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator

from lorelei.parallel.ranks import Ranks
from lorelei.train.contract import TrainEngine
from lorelei.train.megatron.cpu import run_core_on_cpu, run_on_cpu
from lorelei.train.megatron.imports import import_megatron
from lorelei.train.megatron.kind import MegatronSpec


def start_engine(spec: MegatronSpec, ranks: Ranks) -> TrainEngine:
    """The engine of this rank, whose process group is there. Raises like megatron_engine."""
    warnings.filterwarnings("ignore")  # what is missing here is meant to be
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron's order of its kernels
    with _quiet():
        run_on_cpu()
        import_megatron()
        run_core_on_cpu()
        from lorelei.train.megatron.engine import megatron_engine

        return megatron_engine(spec, ranks)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Megatron prints and logs what it builds; a worker's output is the user's terminal."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)
