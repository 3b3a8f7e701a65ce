"""RLOO: leave-one-out advantages and the REINFORCE loss on them.

Source: Ahmadian et al., 2024 (arXiv 2402.14740). Shapes: G rollouts of a group, I items.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from lorelei.algo.loss import LossItems, LossResult, kl_estimate
from lorelei.types import Floats


def leave_one_out(rewards_G: Floats) -> Floats:
    """Each reward less the mean of the others.

    rewards_G: [G]. Returns [G]. Raises ValueError for G < 2. Source: eq. 7 of the paper.
    """
    if len(rewards_G) < 2:
        raise ValueError(f"rloo: a group needs at least 2 rewards, got {len(rewards_G)}")
    others = (rewards_G.sum() - rewards_G) / (len(rewards_G) - 1)
    return (rewards_G - others).astype(np.float32)


def loss(current_I: Tensor, items: LossItems, *, kl_ctl: float = 0.0) -> LossResult:
    """Weighted sum of -ratio A; ratio = current / behaviour is 1 on policy: REINFORCE."""
    item_loss = -(current_I - items.behaviour).exp() * items.advantage
    metrics: dict[str, Tensor] = {}
    if items.reference is not None:
        kl = kl_estimate(items.reference - current_I)
        item_loss = item_loss + kl_ctl * kl
        metrics["kl_reference"] = (kl.detach() * items.weight).sum()
    return LossResult(total=(item_loss * items.weight).sum(), metrics=metrics)
