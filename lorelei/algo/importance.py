"""Importance ratios of the policy that is trained: plain, recomputed or decoupled.

Source: Hilton et al., 2021 (arXiv 2110.00641), used for asynchronous RL by AReaL (arXiv
2505.24298). Shapes: I items.

    decoupled    ratio = current / proximal,  w = proximal / behaviour
    recomputed   ratio = current / proximal,  w = 1   the trainer's word counts, not the sampler's
    plain        ratio = current / behaviour, w = 1

In all of them w = 0 for items whose proximal / behaviour `rejection_sampling` leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from lorelei.algo.algorithm import PolicyAlgorithm
from lorelei.algo.loss import Estimator, Loss, LossItems, LossResult, kl_estimate, loss_path
from lorelei.algo.rejection import RejectionSampling, corrected
from lorelei.config.errors import FieldError
from lorelei.types import CURRENT, Floats, LossSpec, Policy

if TYPE_CHECKING:
    from torch import Tensor


class RatioAlgorithm(PolicyAlgorithm):
    """What the kinds have in common whose loss reads an importance ratio."""

    use_decoupled_loss: bool = Field(
        default=True,
        description="The ratio is to the proximal policy, weighed by proximal / behaviour.",
    )
    recompute_logprob: bool | None = Field(
        default=None,
        description="The trainer computes the log-probabilities at the start of an update itself. "
        "Without the decoupled loss the ratio is then to these. Default: use_decoupled_loss.",
    )
    rejection_sampling: RejectionSampling | None = Field(
        default=None, description="Leave out, or weigh less, what is too far off-policy."
    )

    reward_scaling: float = Field(default=1.0, description="reward = (score + bias) * scaling.")
    reward_clip: float | None = Field(
        default=None, gt=0, description="Rewards are clipped to +- it. Default: not."
    )
    # here only: a baseline of the group's own rewards has the same bias
    reward_bias: float = Field(default=0.0, description="reward = (score + bias) * scaling.")

    @model_validator(mode="after")
    def _has_its_proximal(self) -> RatioAlgorithm:
        if self.use_decoupled_loss and self.recompute_logprob is False:
            raise FieldError(
                "recompute_logprob",
                "false leaves use_decoupled_loss without proximal log-probabilities; "
                "set use_decoupled_loss: false too, or recompute_logprob: true",
            )
        bounds = self.rejection_sampling
        if bounds is not None and bounds.action == "clamp" and not self.use_decoupled_loss:
            raise FieldError(
                "rejection_sampling.action",
                "clamp bounds the weight of the decoupled loss; set use_decoupled_loss: true, or "
                "use mask",
            )
        return self

    def scaled(self, scores_S: Floats) -> Floats:
        rewards = super().scaled(scores_S + self.reward_bias)
        if self.reward_clip is None:
            return rewards
        return rewards.clip(-self.reward_clip, self.reward_clip)

    @property
    def kl_policy(self) -> str:
        trainers_word = self.recompute_logprob and not self.use_decoupled_loss
        return "proximal" if self.use_kl_in_reward and trainers_word else super().kl_policy

    @property
    def policies(self) -> Mapping[str, Policy]:
        """With one optimizer step a batch the proximal policy is the current one: no extra pass."""
        recompute = self.use_decoupled_loss or bool(self.recompute_logprob)
        moves = self.ppo_n_minibatches > 1 or self.kl_policy == "proximal"
        proximal = {"proximal": CURRENT} if recompute and moves else {}
        return {**super().policies, **proximal}

    def ratio_loss(self, function: Loss, **own: float | None) -> LossSpec:
        """The spec of a loss that takes `own` (None: its default) and what `importance` does."""
        form = "recomputed" if self.recompute_logprob else "plain"
        params = {
            **{name: value for name, value in own.items() if value is not None},
            **self.kl_params(),
            "form": "decoupled" if self.use_decoupled_loss else form,
            **(self.rejection_sampling.params() if self.rejection_sampling else {}),
        }
        streams = ("advantage", "behaviour")
        return LossSpec(path=loss_path(function), params=params, streams=streams)


@dataclass(frozen=True, slots=True, kw_only=True)
class Importance:
    """What a loss makes its items' losses of [I], and what `weighed` needs then."""

    log_ratio: Tensor  # with gradient; 0 where it is left out
    advantage: Tensor
    kept: Tensor
    weight: Tensor  # of an item's loss; 0 where it is left out
    current: Tensor
    items: LossItems
    kl_ctl: float
    kl_estimator: Estimator


def importance(
    current_I: Tensor,
    items: LossItems,
    *,
    form: str = "decoupled",
    kl_ctl: float = 0.0,
    kl_estimator: Estimator = "k3",
    **bounds: Any,
) -> Importance:
    """The ratio of a form, and the weight beside it. bounds: see `rejection.corrected`."""
    # no stream: the policy has not moved since the start of the update
    proximal = items.streams.get("proximal", current_I.detach())
    behaviour = items.streams["behaviour"]
    correction, kept = corrected(proximal - behaviour, items.sequence, **bounds)
    # what is left out may be infinite; it is replaced before the exp, because 0 * inf is not 0
    zero = current_I.new_zeros(())
    anchor = behaviour if form == "plain" else proximal
    return Importance(
        log_ratio=(current_I - anchor).where(kept, zero),
        advantage=items.streams["advantage"],
        kept=kept,
        weight=correction.where(kept, zero) if form == "decoupled" else kept,
        current=current_I,
        items=items,
        kl_ctl=kl_ctl,
        kl_estimator=kl_estimator,
    )


def weighed(item_loss_I: Tensor, found: Importance, metrics: Mapping[str, Tensor]) -> LossResult:
    """The result of a loss: its items weighed, and the divergence from the reference added."""
    items, item_loss = found.items, item_loss_I * found.weight
    reported = {**metrics, "rejected": (~found.kept * items.weight).sum()}
    if (reference := items.streams.get("reference")) is not None:
        log_ratio = (reference - found.current).where(found.kept, reference.new_zeros(()))
        kl = kl_estimate(log_ratio, found.kl_estimator)
        if found.kl_ctl:  # else it is in the rewards
            item_loss = item_loss + found.kl_ctl * kl
        reported["kl_reference"] = (kl.detach() * items.weight).sum()
    return LossResult(total=(item_loss * items.weight).sum(), metrics=reported)
