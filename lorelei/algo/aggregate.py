"""How item losses are averaged: as item weights, so that a loss is a plain sum.

Shapes: I items of one adapter's optimizer step.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from lorelei.types import Floats, Longs

Aggregation = Literal["token", "sequence"]


def item_weights(sequence_I: Longs, aggregation: Aggregation) -> Floats:
    """Weights [I] that sum to 1.

    token: every token counts the same (DAPO, arXiv 2503.14476); sequence: every sequence counts
    the same, its tokens share its weight (GRPO, arXiv 2402.03300).
    """
    if aggregation == "token":
        return np.full(len(sequence_I), 1.0 / max(len(sequence_I), 1), dtype=np.float32)
    _, inverse, lengths = np.unique(sequence_I, return_inverse=True, return_counts=True)
    return (1.0 / (lengths[inverse] * len(lengths))).astype(np.float32)
