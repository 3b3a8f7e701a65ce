"""The divergence from the reference as a part of every token's reward.

Source: Ouyang et al., 2022 (arXiv 2203.02155), eq. 2; the estimators: Schulman, 2020
(joschu.net/blog/kl-approx.html). Shapes: I items of one adapter, those of a sequence in a row.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lorelei.algo.loss import Estimator
from lorelei.types import Floats, Longs

Doubles = NDArray[np.float64]

LARGEST = 10.0  # of one token: k2 and k3 have heavy tails


def kl_of_tokens(logprobs_I: Floats, reference_I: Floats, estimator: Estimator) -> Doubles:
    """[I] estimates of KL(policy || reference) at samples of the policy, within +-LARGEST."""
    log_ratio = logprobs_I.astype(np.float64) - reference_I
    match estimator:
        case "k1":
            found = log_ratio
        case "k2":
            found = log_ratio * log_ratio / 2
        case "k3":
            with np.errstate(over="ignore"):  # infinity is clipped too
                found = np.expm1(-log_ratio) + log_ratio
    return np.clip(found, -LARGEST, LARGEST)


def to_go(values_I: Doubles, sequence_I: Longs) -> Doubles:
    """[I] of every item, the sum of its sequence's values from it on."""
    out = np.empty_like(values_I)
    for number in np.unique(sequence_I):
        own = sequence_I == number
        out[own] = np.cumsum(values_I[own][::-1])[::-1]
    return out
