"""What a run must know of an inference engine before anything starts. No torch at import.

Each engine's folder exports one description as `KIND`; `kinds.INFERENCE` has them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorelei.config.rollout import AnyServer, Sampling
from lorelei.config.run import RunConfig
from lorelei.model.config import ModelSizes

if TYPE_CHECKING:
    from lorelei.inference.server.backend import ServerBackend
    from lorelei.inference.server.options import ServerOptions

# (config, model, modules that any adapter has, whether it runs on a CPU); raises ConfigError
Check = Callable[[RunConfig, ModelSizes, Sequence[str], bool], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceKind:
    """An inference engine."""

    config: type[Sampling]  # its section `rollout`
    publishers: tuple[str, ...]  # kinds of `publish` that reach it
    check: Check  # what the engine would ignore or crash on


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """Room that a server makes for adapters; the versions in use must fit."""

    versions: int
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerKind(InferenceKind):
    """An inference engine that runs as servers, in a virtual environment named like the kind."""

    backend: Callable[[ServerOptions | None], ServerBackend]  # None: attach, start none
    slots: Callable[[int, int], Slots]  # of (versions in use, largest rank)
    every_layer: bool  # makes room on every linear layer, whatever is adapted
    memory_option: str  # what share of a device it takes
    memory_share: float  # where that option is not given
    # bytes of keys and values that each process of a CPU server holds; str: the dtype
    cpu_cache: Callable[[ModelSizes, str, AnyServer], int]
