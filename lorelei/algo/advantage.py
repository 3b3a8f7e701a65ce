"""From rewards to advantages, one number a rollout.

Shapes: S rollouts of one adapter's batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from lorelei.config.section import Section
from lorelei.types import Floats, Longs

Level = Literal["group", "batch", "none"]
Doubles = NDArray[np.float64]

EPSILON = 1e-6  # keeps a group of equal rewards at 0 / epsilon = 0


class NormConfig(Section):
    """Over which rollouts a mean is subtracted and a standard deviation divided out."""

    mean_level: Level = Field(default="group", description="Where the mean is taken.")
    std_level: Level = Field(default="group", description="Where the deviation is taken.")

    @property
    def levels(self) -> frozenset[Level]:
        return frozenset((self.mean_level, self.std_level))

    def __call__(self, values_S: Floats, groups_S: Longs) -> Floats:
        """[S] normalised. groups_S: the number of each rollout's group."""
        return normalise(values_S, groups_S, self.mean_level, self.std_level)


def normalise(values_S: Floats, groups_S: Longs, mean_level: Level, std_level: Level) -> Floats:
    """(value - mean) / (std + 1e-6), each over the group, the batch or not at all.

    The standard deviation is the population's (ddof 0), taken around the mean of its own level.
    """
    values = values_S.astype(np.float64)
    centred = values - _at_level(values, groups_S, mean_level, np.mean, 0.0)
    scale = _at_level(values, groups_S, std_level, np.std, 1.0)
    if std_level == "none":
        return centred.astype(np.float32)
    return (centred / (scale + EPSILON)).astype(np.float32)


def _at_level(
    values_S: Doubles,
    groups_S: Longs,
    level: Level,
    statistic: Callable[[Doubles], np.floating[Any]],
    default: float,
) -> Doubles:
    if level == "none":
        return np.full_like(values_S, default)
    if level == "batch":
        return np.full_like(values_S, statistic(values_S))
    out = np.empty_like(values_S)
    for group in np.unique(groups_S):
        members = groups_S == group
        out[members] = statistic(values_S[members])
    return out
