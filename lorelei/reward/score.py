"""What users' code returns as a score: a finite number, alone or with metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import cast


class NotANumber(ValueError):
    """What was returned instead of a finite number."""


def read_score(scored: object) -> tuple[float, dict[str, float]]:
    """(value, metrics) of a number or of (number, {metric: number}). Raises NotANumber."""
    value: object = scored
    metrics: Mapping[object, object] = {}
    pair = cast(tuple[object, ...], scored) if isinstance(scored, tuple) else ()
    if len(pair) == 2 and isinstance(pair[1], Mapping):
        value, metrics = pair[0], cast(Mapping[object, object], pair[1])
    numbers = {str(k): _finite(v, f"metric {k} ") for k, v in metrics.items()}
    return _finite(value), numbers


def _finite(value: object, where: str = "") -> float:
    if not isinstance(value, Real):
        raise NotANumber(where + ("None" if value is None else type(value).__name__))
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise NotANumber(f"{where}{number}")
    return number
