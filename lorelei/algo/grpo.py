"""GRPO: advantages by group and a clipped ratio loss, plain, recomputed or decoupled.

Source: Shao et al., 2024 (arXiv 2402.03300); the decoupling of behaviour and proximal policy:
Hilton et al., 2021 (arXiv 2110.00641), used for asynchronous RL by AReaL (arXiv 2505.24298);
the separate upper clip: DAPO (arXiv 2503.14476). Shapes: I items.

All three forms are -min(ratio A, clip(ratio) A) * w, plus kl_ctl * KL(current, reference):

    decoupled    ratio = current / proximal,  w = proximal / behaviour
    recomputed   ratio = current / proximal,  w = 1   the trainer's word counts, not the sampler's
    plain        ratio = current / behaviour, w = 1

In all of them w = 0 for items whose proximal / behaviour lies outside [lower, upper].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from lorelei.algo.algorithm import PolicyAlgorithm
from lorelei.algo.loss import LossItems, LossResult, kl_estimate, loss_path
from lorelei.config.errors import FieldError
from lorelei.config.section import Section
from lorelei.types import CURRENT, Floats, LossSpec, Policy

if TYPE_CHECKING:
    from torch import Tensor


class RejectionSampling(Section):
    """Tokens whose ratio of proximal to behaviour probability is outside are left out."""

    metric: Literal["ratio"] = Field(default="ratio", description="What the bounds are on.")
    upper: float | None = Field(default=None, gt=0, description="Highest ratio kept.")
    lower: float | None = Field(default=None, ge=0, description="Lowest ratio kept.")

    @model_validator(mode="after")
    def _keeps_something(self) -> RejectionSampling:
        if self.upper is None and self.lower is None:
            raise FieldError("upper", "give upper, lower or both")
        if self.upper is not None and self.lower is not None and self.lower >= self.upper:
            raise FieldError("lower", f"{self.lower} is not below upper: {self.upper}")
        return self


class Grpo(PolicyAlgorithm):
    """Group-relative advantages and a clipped ratio."""

    kind: Literal["grpo"] = Field(default="grpo", description="Which algorithm.")
    eps_clip: float = Field(default=0.2, gt=0, lt=1, description="Ratios below 1 - it are clipped.")
    eps_clip_higher: float | None = Field(
        default=None, gt=0, description="Ratios above 1 + it are clipped. Default: eps_clip."
    )
    use_decoupled_loss: bool = Field(
        default=True, description="Clip around the proximal policy, weigh by proximal / behaviour."
    )
    recompute_logprob: bool | None = Field(
        default=None,
        description="The trainer computes the log-probabilities at the start of an update itself. "
        "Without the decoupled loss the ratio is then to these. Default: use_decoupled_loss.",
    )
    rejection_sampling: RejectionSampling | None = Field(
        default=None, description="Leave out tokens that are too far off-policy."
    )

    reward_scaling: float = Field(default=1.0, description="reward = (score + bias) * scaling.")
    reward_clip: float | None = Field(
        default=None, gt=0, description="Rewards are clipped to +- it. Default: not."
    )
    # here only: a baseline of the group's own rewards has the same bias
    reward_bias: float = Field(default=0.0, description="reward = (score + bias) * scaling.")

    @model_validator(mode="after")
    def _has_its_proximal(self) -> Grpo:
        if self.use_decoupled_loss and self.recompute_logprob is False:
            raise FieldError(
                "recompute_logprob",
                "false leaves use_decoupled_loss without proximal log-probabilities; "
                "set use_decoupled_loss: false too, or recompute_logprob: true",
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

    def loss(self) -> LossSpec:
        if self.use_decoupled_loss:
            function = decoupled_loss
        else:
            function = recomputed_loss if self.recompute_logprob else plain_loss
        params = {"eps_clip": self.eps_clip, "kl_ctl": self.loss_kl}
        if self.eps_clip_higher is not None:
            params["eps_clip_higher"] = self.eps_clip_higher
        bounds = self.rejection_sampling
        if bounds is not None and bounds.upper is not None:
            params["upper"] = bounds.upper
        if bounds is not None and bounds.lower is not None:
            params["lower"] = bounds.lower
        path = loss_path(function)
        return LossSpec(path=path, params=params, streams=("advantage", "behaviour"))


def decoupled_loss(current_I: Tensor, items: LossItems, **params: float) -> LossResult:
    """The form for batches that older versions sampled. params: see `_clipped`."""
    proximal, correction = _off_policy(current_I, items)
    return _clipped(current_I, proximal, items, correction, correction, **params)


def recomputed_loss(current_I: Tensor, items: LossItems, **params: float) -> LossResult:
    """The ratio to the trainer's own log-probabilities at the start of the update."""
    proximal, correction = _off_policy(current_I, items)
    return _clipped(current_I, proximal, items, correction, None, **params)


def plain_loss(current_I: Tensor, items: LossItems, **params: float) -> LossResult:
    """The ratio to the log-probabilities that the sampler gave."""
    _, correction = _off_policy(current_I, items)
    return _clipped(current_I, items.streams["behaviour"], items, correction, None, **params)


def _off_policy(current_I: Tensor, items: LossItems) -> tuple[Tensor, Tensor]:
    """Proximal log-probabilities, and proximal / behaviour."""
    # no stream: the policy has not moved since the start of the update
    proximal = items.streams.get("proximal", current_I.detach())
    return proximal, (proximal - items.streams["behaviour"]).exp()


def _clipped(
    current_I: Tensor,
    anchor_I: Tensor,
    items: LossItems,
    correction_I: Tensor,
    weight_I: Tensor | None,
    *,
    eps_clip: float = 0.2,
    eps_clip_higher: float | None = None,
    kl_ctl: float = 0.0,
    upper: float = float("inf"),
    lower: float = 0.0,
) -> LossResult:
    """Ratios to the anchor below 1 - eps_clip and above 1 + eps_clip_higher (or eps_clip) clip.

    Items whose correction is not within [lower, upper] are left out; weight: of the others, or 1.
    """
    kept_I = (correction_I <= upper) & (correction_I >= lower)
    # what is rejected may be infinite; it is replaced before the exp, because 0 * inf is not 0
    zero = current_I.new_zeros(())
    advantage = items.streams["advantage"]
    weight = kept_I if weight_I is None else weight_I.where(kept_I, zero)
    ratio = (current_I - anchor_I).where(kept_I, zero).exp()
    high = eps_clip if eps_clip_higher is None else eps_clip_higher
    clipped = ratio.clamp(1 - eps_clip, 1 + high)
    item_loss = -(ratio * advantage).minimum(clipped * advantage) * weight
    metrics = {
        "clipped": ((ratio != clipped) * items.weight).sum().detach(),
        "rejected": (~kept_I * items.weight).sum(),
    }
    if (reference := items.streams.get("reference")) is not None:
        kl = kl_estimate((reference - current_I).where(kept_I, zero))
        if kl_ctl:  # else it is in the rewards
            item_loss = item_loss + kl_ctl * kl
        metrics["kl_reference"] = (kl.detach() * items.weight).sum()
    return LossResult(total=(item_loss * items.weight).sum(), metrics=metrics)
