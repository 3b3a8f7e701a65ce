"""From rewards to advantages.

Shapes: S values, one of each rollout of one adapter's batch, or of each of its tokens.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from lorelei.config.errors import FieldError
from lorelei.config.section import Section
from lorelei.types import Floats, Longs

Level = Literal["group", "batch", "none"]
Doubles = NDArray[np.float64]


class NormConfig(Section):
    """Over which rollouts a mean is subtracted and a standard deviation divided out."""

    mean_level: Level = Field(default="group", description="Where the mean is taken.")
    std_level: Level = Field(default="group", description="Where the deviation is taken.")
    weigh_by: Literal["rollout", "token"] = Field(
        default="rollout",
        description="In means and deviations a rollout counts once, or once for each token that "
        "was sampled in it.",
    )
    mean_leave1out: bool = Field(
        default=False, description="The mean leaves out the value that it is subtracted from."
    )
    std_unbiased: bool = Field(
        default=False, description="Divide squares by their number less one (ddof 1)."
    )
    std_around: Literal["own_mean", "subtracted_mean"] = Field(
        default="own_mean",
        description="The deviation is the one around the mean of std_level, or around the mean "
        "that is subtracted.",
    )
    # the default keeps a group of equal rewards at 0 / eps = 0
    eps: float = Field(default=1e-6, ge=0, description="Added to the deviation.")

    @model_validator(mode="after")
    def _has_effects(self) -> NormConfig:
        if self.mean_level == "none" and self.mean_leave1out:
            raise FieldError("mean_leave1out", "true does nothing with mean_level: none; remove it")
        if self.std_level == "none":
            for name in ("std_unbiased", "std_around", "eps"):
                if name in self.model_fields_set and getattr(self, name) != _default(name):
                    raise FieldError(
                        name, f"{getattr(self, name)} does nothing with std_level: none; remove it"
                    )
        return self

    @property
    def levels(self) -> frozenset[Level]:
        return frozenset((self.mean_level, self.std_level))

    def __call__(
        self, values_S: Floats | Doubles, groups_S: Longs, weights_S: Doubles | Longs | None = None
    ) -> Floats:
        """[S] (value - mean) / (deviation + eps), each over the group, the batch or not at all.

        groups_S: the number of each value's group. weights_S: how often each counts; None: once.
        """
        values = values_S.astype(np.float64)
        weights = np.ones_like(values) if weights_S is None else weights_S.astype(np.float64)
        means = np.zeros_like(values)
        for members in _parts(groups_S, self.mean_level):
            means[members] = self._mean(values[members], weights[members])
        centred = values - means
        if self.std_level == "none":
            return centred.astype(np.float32)
        scale = np.empty_like(values)
        for members in _parts(groups_S, self.std_level):
            own, w = values[members], weights[members]
            around = means[members] if self.std_around == "subtracted_mean" else _mean(own, w)
            scale[members] = self._deviation(own - around, w)
        return (centred / (scale + self.eps)).astype(np.float32)

    def _mean(self, values_S: Doubles, weights_S: Doubles) -> Doubles | float:
        if not self.mean_leave1out:
            return _mean(values_S, weights_S)
        if weights_S.sum() <= 1:
            return 0.0
        # one of a value's weight is left out: the others are its equals
        others = (weights_S * values_S).sum() - values_S
        return others / (weights_S.sum() - 1)

    def _deviation(self, centred_S: Doubles, weights_S: Doubles) -> float:
        count = weights_S.sum() - self.std_unbiased
        if count <= 0:
            return 1.0  # of one value: nothing to divide by
        return float(np.sqrt((weights_S * (centred_S * centred_S)).sum() / count))


def _default(name: str) -> object:
    return NormConfig.model_fields[name].default


def _mean(values_S: Doubles, weights_S: Doubles) -> float:
    return float((weights_S * values_S).sum() / weights_S.sum())


def _parts(groups_S: Longs, level: Level) -> list[NDArray[np.bool_]]:
    """[S] masks of what shares a statistic."""
    if level == "none":
        return []
    if level == "batch":
        return [np.ones(len(groups_S), dtype=np.bool_)]
    return [groups_S == group for group in np.unique(groups_S)]
