"""adapter_config.json: what it says of an adapter, and why some adapters cannot be taken.

Fields that only say where the tensors lie (target_modules, layers_to_transform, layers_pattern,
exclude_modules) or that linear layers ignore (fan_in_fan_out) are not needed: the tensors tell.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lorelei.store.durable import CorruptFile, StoreError, read_file
from lorelei.store.record import json_object

# field -> the values that leave an adapter plain LoRA; why others are none, and what to do
_PLAIN: dict[str, tuple[tuple[Any, ...], str]] = {
    "peft_type": (("LORA",), "is no LoRA; train or convert one with peft's LoraConfig"),
    "lora_bias": ((None, False), "trains biases; train with lora_bias=False"),
    "use_dora": ((None, False), "trains magnitudes too; train with use_dora=False, or merge it"),
    "use_qalora": ((None, False), "pools the inputs in groups; train with use_qalora=False"),
    "modules_to_save": (
        (None, []),
        "are whole trained modules, not LoRA; make them target_modules, or merge them into the "
        "base and take that as model",
    ),
    "trainable_token_indices": (
        (None, [], {}),
        "are trained rows of the embedding, not LoRA; train without them, or merge them into the "
        "base and take that as model",
    ),
    "layer_replication": (
        (None, []),
        "repeats layers of the base; train an adapter of a base without repeated layers",
    ),
    "alora_invocation_tokens": (
        (None, []),
        "let the adapter act behind these tokens only; train without them",
    ),
    "arrow_config": ((None,), "routes between adapters; take one of them"),
}
_CHANGES_BASE = "was trained on a base from whose weights its first values were subtracted; "
_CONVERT = (
    "save it again with peft's save_pretrained(..., path_initial_model_for_weight_conversion="
    "INITIAL_ADAPTER), which writes plain LoRA"
)
_INITS = (None, True, False, "gaussian", "eva", "orthogonal")  # these leave the base as it is
_NEEDED = "needs a base that Lorelei does not load; train with init_lora_weights=True"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftConfig:
    """An adapter's shape. Patterns are regular expressions for the end of a module's name."""

    path: Path
    rank: int
    alpha: float
    dropout: float
    rslora: bool
    rank_pattern: Mapping[str, float]
    alpha_pattern: Mapping[str, float]
    target_parameters: tuple[str, ...]
    peft_version: str | None

    def rank_of(self, module: str) -> int:
        return int(_pattern(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        """Factor on B @ A, as peft computes it."""
        rank = self.rank_of(module)
        alpha = _pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (rank**0.5 if self.rslora else rank)


def read_peft_config(path: Path) -> PeftConfig:
    """Raises StoreError naming file, field and value of what is damaged or not plain LoRA."""
    try:
        config = json_object(read_file(path), path)
    except RecursionError:
        raise CorruptFile(f"{path}: not JSON: nested too deeply") from None
    for field, (allowed, reason) in _PLAIN.items():
        if (value := config.get(field)) not in allowed:
            raise StoreError(f"{path}: {field}: {_short(value)} {reason}")
    _check_init(path, config.get("init_lora_weights"))
    rank = _number(path, "r", config.get("r", 8))
    _whole(path, "r", rank)
    dropout = _number(path, "lora_dropout", config.get("lora_dropout", 0.0))
    if not 0 <= dropout < 1:
        raise CorruptFile(f"{path}: lora_dropout: {dropout!r} must be at least 0 and below 1")
    rslora = config.get("use_rslora") or False
    if not isinstance(rslora, bool):
        raise CorruptFile(f"{path}: use_rslora: {_short(rslora)} must be true or false")
    ranks = _patterns(path, "rank_pattern", config.get("rank_pattern"))
    for value in ranks.values():
        _whole(path, "rank_pattern", value)
    parameters: Any = config.get("target_parameters") or []
    named: list[Any] = cast(Any, parameters) if isinstance(parameters, list) else [None]
    if not all(isinstance(name, str) for name in named):
        raise CorruptFile(
            f"{path}: target_parameters: {_short(parameters)} must be a list of names"
        )
    version = config.get("peft_version")
    return PeftConfig(
        path=path,
        rank=int(rank),
        alpha=_number(path, "lora_alpha", config.get("lora_alpha", 8)),
        dropout=dropout,
        rslora=rslora,
        rank_pattern=ranks,
        alpha_pattern=_patterns(path, "alpha_pattern", config.get("alpha_pattern")),
        target_parameters=tuple(named),
        peft_version=version if isinstance(version, str) else None,
    )


def _check_init(path: Path, init: Any) -> None:
    if init in _INITS:
        return
    field = f"{path}: init_lora_weights: {_short(init)}"
    kind = init.lower() if isinstance(init, str) else ""
    if kind.startswith(("pissa", "olora", "corda")):
        raise StoreError(f"{field} {_CHANGES_BASE}{_CONVERT}")
    if kind.startswith(("loftq", "lora_ga")):
        raise StoreError(f"{field} {_CHANGES_BASE}{_NEEDED}")
    raise StoreError(
        f"{field} is not known, and may change the base's weights; allowed: true, false, "
        "gaussian, eva, orthogonal"
    )


def _patterns(path: Path, field: str, value: Any) -> Mapping[str, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CorruptFile(f"{path}: {field}: {_short(value)} must map names to numbers")
    found: dict[str, float] = {}
    for pattern, number in cast(dict[str, Any], value).items():
        found[pattern] = _number(path, f"{field}: {pattern}", number)
        try:
            re.compile(pattern)
        except re.error as error:
            raise CorruptFile(
                f"{path}: {field}: {pattern!r} is not a regular expression: {error}"
            ) from error
    return found


def _pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The first that matches, as peft chooses it."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _number(path: Path, field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
        raise CorruptFile(f"{path}: {field}: {_short(value)} must be a finite number")
    return value


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def _whole(path: Path, field: str, value: float) -> None:
    if value < 1 or value != int(value):
        raise CorruptFile(f"{path}: {field}: {value!r} must be a whole number of 1 or more")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
