"""A named algorithm as a preset: which advantages, which loss with which parameters.

Shapes: S rollouts of one adapter's batch, G of one group.
"""

from __future__ import annotations

import numpy as np

from lorelei.algo.advantage import normalise
from lorelei.algo.rloo import leave_one_out
from lorelei.config.algo import AlgoConfig
from lorelei.types import AdamHyper, Floats, Longs, LossSpec


def advantages(algo: AlgoConfig, rewards_S: Floats, groups_S: Longs) -> Floats:
    """[S] one advantage a rollout: scale and normalise rewards, subtract a baseline, normalise."""
    values = ((rewards_S + algo.reward_bias) * algo.reward_scaling).astype(np.float32)
    if algo.reward_norm is not None:
        norm = algo.reward_norm
        values = normalise(values, groups_S, norm.mean_level, norm.std_level)
    if algo.kind == "rloo":
        for group in np.unique(groups_S):
            members = groups_S == group
            values[members] = leave_one_out(values[members])
    if algo.adv_norm is not None:
        norm = algo.adv_norm
        values = normalise(values, groups_S, norm.mean_level, norm.std_level)
    return values


def loss_spec(algo: AlgoConfig) -> LossSpec:
    """The loss function and its frozen parameters."""
    if algo.kind == "rloo":
        return LossSpec(path="lorelei.algo.rloo:loss", params={"kl_ctl": algo.kl_ctl})
    reject = algo.rejection_sampling
    return LossSpec(
        path="lorelei.algo.grpo:loss",
        params={
            "eps_clip": algo.eps_clip,
            "eps_clip_higher": algo.eps_clip_higher,
            "decoupled": algo.use_decoupled_loss,
            "recompute": algo.needs_proximal,
            "reject_above": reject.upper if reject else None,
            "reject_below": reject.lower if reject else None,
            "kl_ctl": algo.kl_ctl,
        },
    )


def adam_hyper(algo: AlgoConfig, step: int, steps: int) -> AdamHyper:
    """The optimizer's numbers for step 0 <= `step` < `steps`: warm-up, then the schedule."""
    rate = algo.lr
    if step < algo.warmup_steps:
        rate *= (step + 1) / (algo.warmup_steps + 1)
    else:
        done = (step - algo.warmup_steps) / max(steps - algo.warmup_steps, 1)
        match algo.lr_schedule:
            case "constant":
                pass
            case "linear":
                rate *= 1 - done
            case "cosine":
                rate *= 0.5 * (1 + float(np.cos(np.pi * done)))
    return AdamHyper(
        lr=rate,
        beta1=algo.beta1,
        beta2=algo.beta2,
        eps=algo.eps,
        weight_decay=algo.weight_decay,
        max_grad_norm=algo.gradient_clipping,
    )
