"""Whose log-probabilities a rollout engine gave. Numpy only.

Shapes: T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, sqrt

import numpy as np

from lorelei.types import Floats

# of random differences of the size of the noise, one in 30 000 would look like another policy
_CERTAIN = 8.0
_LEAST_NOISE = 1e-6  # nats; equal engines agree to the bit, and fp32 rounds
_NOISE_ALLOWED = 10.0  # times what the base model showed: trained policies have larger logits
_ALWAYS_ALLOWED = 1e-3  # nats, fp32 on other kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Distances are root mean squares over T tokens, in nats; infinite when not a number."""

    distance: float  # from the policy that should have answered
    tolerance: float  # how large `distance` may be
    others: Mapping[str, float]  # distances from policies that should not have
    distinguishable: frozenset[str]  # those that differ from the right one by more than noise

    @property
    def taken_for(self) -> str | None:
        """The policy that answered instead, when one is nearer than the right one."""
        nearer = {
            name: d
            for name, d in self.others.items()
            if name in self.distinguishable and d < self.distance
        }
        return min(nearer, key=lambda name: nearer[name], default=None)

    @property
    def holds(self) -> bool:
        """Whether the right policy answered, as far as can be told."""
        return self.taken_for is None and self.distance <= self.tolerance


def judge(
    scored_T: Floats, right_T: Floats, others: Mapping[str, Floats], noise: float, more: float = 0.0
) -> Verdict:
    """Compare what an engine scored with what the trainer says of each policy.

    noise: `distance` of the two engines on one policy that both surely have. more: nats added to
    the tolerance.
    """
    noise = max(noise, _LEAST_NOISE)
    least = _CERTAIN / sqrt(len(right_T)) * noise
    return Verdict(
        distance=distance(scored_T, right_T),
        tolerance=_NOISE_ALLOWED * noise + _ALWAYS_ALLOWED + more,
        others={name: distance(scored_T, other_T) for name, other_T in others.items()},
        distinguishable=frozenset(
            name for name, other_T in others.items() if distance(right_T, other_T) >= least
        ),
    )


def distance(one_T: Floats, other_T: Floats) -> float:
    """Root mean square of the difference; infinite for other lengths and numbers not finite."""
    if one_T.shape != other_T.shape:
        return inf
    difference = one_T.astype(np.float64) - other_T
    mean = float(np.mean(difference**2))
    return sqrt(mean) if mean < inf else inf


def share_of_way(scored_T: Floats, start_T: Floats, end_T: Floats) -> float:
    """How far `scored_T` lies on the line between two policies: 0 at `start_T`, 1 at `end_T`."""
    way_T = end_T.astype(np.float64) - start_T
    return float((scored_T - start_T) @ way_T / max(float(way_T @ way_T), 1e-30))
