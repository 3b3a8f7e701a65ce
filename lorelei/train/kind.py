"""What a run must know of a train engine before anything starts. No torch at import.

Each engine's folder exports one description as `KIND`; `kinds.TRAIN` has them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lorelei.config.errors import ConfigError
from lorelei.config.train import TrainSection
from lorelei.model.config import ModelInfo, ModelSizes

if TYPE_CHECKING:
    from lorelei.model.decoder import Decoder
    from lorelei.parallel.ranks import Ranks
    from lorelei.train.contract import TrainEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """What a worker builds its rank of an engine from; an engine adds fields of its section."""

    model: str  # folder of the base model
    dtype: str  # a name in model.backend.DTYPES
    max_tokens_per_mb: int
    recompute: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    """The base model as memory is counted."""

    sizes: ModelSizes
    parameters: Mapping[str, int]  # by part
    item_bytes: int
    on_cpu: bool

    @property
    def total(self) -> int:
        """Of all parameters."""
        return sum(self.parameters.values())

    @property
    def ends(self) -> int:
        """Parameters of embedding and head."""
        return self.parameters["embeddings"] + self.parameters["lm_head"]


class Amount(NamedTuple):
    """Memory of one rank."""

    name: str
    bytes: int
    how: str  # the product that gives it, for people


@dataclass(frozen=True, slots=True, kw_only=True)
class RankShare:
    """What one rank has of the model, and the micro-batches whose activations it keeps."""

    base: tuple[Amount, ...]  # of the frozen weights
    layers: int
    in_flight: int = 1
    head: bool = True  # whether it computes the log-probabilities
    adapter_parts: int = 1  # adapters are divided by this
    adapter_split: str = ""  # and the words for it


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainKind:
    """A train engine. The functions' first argument is its section or its spec, as types say."""

    config: type[TrainSection]  # its section `train`
    spec: type[EngineSpec]
    # one rank in a worker process, whose process group is there; raises ValueError
    build: Callable[[Any, Ranks], TrainEngine]
    # the ranks that may hold most
    shares: Callable[[Any, BaseModel], Sequence[RankShare]]
    # (section, model, its config.json): raises ConfigError for what the engine cannot do with it
    check: Callable[[Any, ModelSizes, Mapping[str, Any]], None]
    venv: str | None = None  # the virtual environment of its workers; None: this one
    # the engine in this process; None: always in workers
    here: Callable[[Any, Decoder], TrainEngine] | None = None
    # looks at a model that our decoder does not build; None: the engine takes no such models
    foreign_info: Callable[[Any, Path], ModelInfo] | None = None

    def make_spec(self, section: TrainSection, model: Path, dtype: str) -> EngineSpec:
        """Of a run's section; fields of the same name mean the same."""
        given = {"model": str(model), "dtype": dtype, "recompute": section.gradient_checkpointing}
        own = {f.name: getattr(section, f.name) for f in fields(self.spec) if f.name not in given}
        return self.spec(**given, **own)


def check_divides(field: str, value: int, what: str, count: int) -> None:
    """Raises ConfigError unless `value`, of train.`field`, divides the model's `count`."""
    if count % value:
        allowed = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0 and n <= 64)
        raise ConfigError(
            f"train.{field}: {value} does not divide the model's {count} {what}; allowed: {allowed}"
        )
