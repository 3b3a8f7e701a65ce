"""GRPO's clipped ratio loss, in its plain and its decoupled form.

Source: Shao et al., 2024 (arXiv 2402.03300); the decoupling of behaviour and proximal policy:
Hilton et al., 2021 (arXiv 2110.00641), used for asynchronous RL by AReaL (arXiv 2505.24298);
the separate upper clip: DAPO (arXiv 2503.14476). Shapes: I items.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorelei.algo.loss import LossItems, LossResult, kl_estimate


def loss(
    current_I: Tensor,
    items: LossItems,
    *,
    eps_clip: float = 0.2,
    eps_clip_higher: float | None = None,
    decoupled: bool = True,
    recompute: bool = False,
    reject_above: float | None = None,
    reject_below: float | None = None,
    kl_ctl: float = 0.0,
) -> LossResult:
    """Weighted sum of -min(ratio A, clip(ratio) A), plus kl_ctl * KL(current, reference).

    decoupled: the ratio is current / proximal, and each item is weighted by proximal / behaviour;
    otherwise the ratio is current / behaviour, or current / proximal with `recompute`, which takes
    the trainer's word for what the sampler's probabilities were. Items whose
    proximal / behaviour lies outside [reject_below, reject_above] give no loss and no gradient.
    """
    proximal = items.proximal if items.proximal is not None else current_I.detach()
    correction = (proximal - items.behaviour).exp()
    kept = torch.ones_like(correction, dtype=torch.bool)
    if reject_above is not None:
        kept = kept & (correction <= reject_above)
    if reject_below is not None:
        kept = kept & (correction >= reject_below)
    # what is rejected may be infinite; it is replaced before the exp, because 0 * inf is not 0
    zero = torch.zeros_like(correction)
    anchor = proximal if decoupled or recompute else items.behaviour
    ratio = torch.where(kept, current_I - anchor, zero).exp()
    high = eps_clip if eps_clip_higher is None else eps_clip_higher
    clipped = ratio.clamp(1 - eps_clip, 1 + high)
    item_loss = -torch.minimum(ratio * items.advantage, clipped * items.advantage)
    item_loss = item_loss * (torch.where(kept, correction, zero) if decoupled else kept)
    metrics = {
        "clipped": ((ratio != clipped) * items.weight).sum().detach(),
        "rejected": (~kept * items.weight).sum(),
    }
    if items.reference is not None:
        kl = kl_estimate(torch.where(kept, items.reference - current_I, zero))
        item_loss = item_loss + kl_ctl * kl
        metrics["kl_reference"] = (kl.detach() * items.weight).sum()
    return LossResult(total=(item_loss * items.weight).sum(), metrics=metrics)
