"""The algorithm: advantages, loss and optimizer of one adapter."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from lorelei.config.errors import FieldError
from lorelei.config.section import Section

Level = Literal["group", "batch", "none"]


class NormConfig(Section):
    """Over which rollouts a mean is subtracted and a standard deviation divided out."""

    mean_level: Level = Field(default="group", description="Where the mean is taken.")
    std_level: Level = Field(default="group", description="Where the deviation is taken.")

    @property
    def levels(self) -> frozenset[Level]:
        return frozenset((self.mean_level, self.std_level))


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


def _default_adv_norm(fields: dict[str, Any]) -> NormConfig | None:
    # RLOO's leave-one-out baseline is its normalisation
    return None if fields.get("kind") == "rloo" else NormConfig()


class AlgoConfig(Section):
    """GRPO or RLOO with the decoupled PPO loss, and AdamW."""

    kind: Literal["grpo", "rloo"] = Field(default="grpo", description="Which advantages.")

    lr: float = Field(default=2e-4, gt=0, description="Peak learning rate.")
    lr_schedule: Literal["constant", "cosine", "linear"] = Field(
        default="constant", description="How the rate falls after the warm-up."
    )
    warmup_steps: int = Field(default=0, ge=0, description="Steps until the rate is at its peak.")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's beta1.")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW's beta2.")
    eps: float = Field(default=1e-8, gt=0, description="AdamW's epsilon.")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decoupled weight decay.")
    gradient_clipping: float = Field(
        default=1.0, ge=0, description="Largest gradient norm of an adapter; 0: no clipping."
    )

    batch_size: int = Field(default=4, ge=1, description="Prompts (groups) of one step.")
    ppo_n_minibatches: int = Field(default=1, ge=1, description="Optimizer steps of one step.")

    eps_clip: float = Field(default=0.2, gt=0, lt=1, description="Ratios below 1 - it are clipped.")
    eps_clip_higher: float | None = Field(
        default=None, gt=0, description="Ratios above 1 + it are clipped. Default: eps_clip."
    )
    kl_ctl: float = Field(default=0.0, ge=0, description="Weight of the divergence from the base.")
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
    loss_aggregation: Literal["token", "sequence"] = Field(
        default="token", description="Every token, or every rollout, has the same weight."
    )

    reward_scaling: float = Field(default=1.0, description="reward = (score + bias) * scaling.")
    reward_bias: float = Field(default=0.0, description="reward = (score + bias) * scaling.")
    reward_norm: NormConfig | None = Field(default=None, description="Normalise rewards.")
    adv_norm: NormConfig | None = Field(
        default_factory=_default_adv_norm,
        description="Normalise advantages. Default: by group for grpo, not at all for rloo.",
    )
    drop_zero_variance_groups: bool = Field(
        default=False, description="Sample another group for one whose rewards are all equal."
    )

    @model_validator(mode="after")
    def _fits_together(self) -> AlgoConfig:
        if self.batch_size % self.ppo_n_minibatches:
            raise FieldError(
                "ppo_n_minibatches",
                f"{self.ppo_n_minibatches} does not divide batch_size: {self.batch_size}; "
                "use a divisor of it",
            )
        if self.use_decoupled_loss and self.recompute_logprob is False:
            raise FieldError(
                "recompute_logprob",
                "false leaves use_decoupled_loss without proximal log-probabilities; "
                "set use_decoupled_loss: false too, or recompute_logprob: true",
            )
        if self.kind == "rloo" and self.rejection_sampling is not None:
            raise FieldError(
                "rejection_sampling",
                "is refused with kind: rloo, whose loss drops no tokens; use kind: grpo or null",
            )
        return self

    @property
    def needs_proximal(self) -> bool:
        """Whether the loss looks at the policy at the start of the update."""
        return self.use_decoupled_loss or bool(self.recompute_logprob)

    @property
    def statistics(self) -> frozenset[Level]:
        """Over which levels statistics of rollouts are taken."""
        norms = [norm for norm in (self.reward_norm, self.adv_norm) if norm is not None]
        levels: set[Level] = {level for norm in norms for level in norm.levels}
        if self.kind == "rloo":
            levels.add("group")
        return frozenset(levels)
