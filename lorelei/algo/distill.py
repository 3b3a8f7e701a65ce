"""On-policy distillation: the student learns from a teacher on its own samples.

    A_t = reward_weight A - sum_k discount^k (log s - log T)_(t+k)
    -ratio A_t,  ratio = current / behaviour

Sources: the sum with discount 0, as an advantage: Lu et al., 2025
(thinkingmachines.ai/blog/on-policy-distillation); learning from a teacher on the student's samples:
GKD, Agarwal et al., 2023 (arXiv 2306.13649); with discount 1 it is the policy gradient of the
reverse divergence of whole answers: MiniLLM, Gu et al., 2023 (arXiv 2306.08543), eq. 2. s is the
student that sampled, T the teacher, A what `PolicyAlgorithm` makes of rewards. Unlike GKD and
MiniLLM only sampled tokens are compared, and no data set's answers are mixed in.
Shapes: I items of one adapter, those of a sequence in a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field, model_validator

from lorelei.algo.advantage import Level
from lorelei.algo.algorithm import PolicyAlgorithm
from lorelei.algo.frozen import FrozenPolicy
from lorelei.algo.kl_reward import Doubles, kl_of_tokens
from lorelei.algo.loss import Estimator, LossItems, LossResult, loss_path
from lorelei.algo.rloo import loss as policy_gradient
from lorelei.config.errors import FieldError
from lorelei.types import CURRENT, Floats, Items, Longs, LossSpec, Policy, Rollout

if TYPE_CHECKING:
    from torch import Tensor

OF_REWARDS = (
    *("reward_scaling", "reward_norm", "adv_norm", "use_kl_in_reward", "turn_discount"),
    *("overlong_penalty", "drop_zero_variance_groups"),
)


class Distill(PolicyAlgorithm):
    """Reverse divergence from a teacher, alone or mixed with a reward."""

    kind: Literal["distill"] = Field(description="Which algorithm.")
    teacher: FrozenPolicy = Field(
        description="What the adapter learns from: base, an adapter's folder in PEFT's format, or "
        "RUN:ADAPTER@vN; its path is relative to the YAML file."
    )
    discount: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="How much the divergence of the next token counts for a token, the one after "
        "it by its square; 0: its own only.",
    )
    reward_weight: float = Field(
        default=0.0, ge=0, description="Weight of the reward's advantage. 0: no reward is needed."
    )
    recompute_logprob: bool = Field(
        default=False,
        description="The student is the trainer's at the start of the update, which takes a pass, "
        "not the sampler's.",
    )

    @model_validator(mode="after")
    def _reward_has_effects(self) -> Distill:
        for name in OF_REWARDS if self.reward_weight == 0 else ():
            value = getattr(self, name)
            if value != type(self).model_fields[name].get_default(call_default_factory=True):
                raise FieldError(
                    name, f"{value} does nothing with reward_weight: 0; raise it, or remove this"
                )
        return self

    @property
    def needs_reward(self) -> bool:
        return self.reward_weight > 0

    @property
    def statistics(self) -> frozenset[Level]:
        return super().statistics if self.needs_reward else frozenset()

    @property
    def student(self) -> str:
        """The stream of the policy that is compared with the teacher."""
        return "proximal" if self.recompute_logprob else "behaviour"

    @property
    def policies(self) -> Mapping[str, Policy]:
        proximal = {"proximal": CURRENT} if self.recompute_logprob else {}
        return {**super().policies, **proximal, "teacher": self.teacher}

    @property
    def credit_reads_policies(self) -> bool:
        return True

    def loss(self) -> LossSpec:
        streams = ("advantage", "behaviour", "teacher")
        return LossSpec(path=loss_path(loss), params=self.kl_params(), streams=streams)

    def credit(self, groups: Sequence[Sequence[Rollout]]) -> list[list[Floats]]:
        """Of the reward alone; zero without one. What the teacher says comes by `with_policies`."""
        if self.needs_reward:
            return super().credit(groups)
        return [[np.zeros(r.sampled_tokens, np.float32) for r in group] for group in groups]

    def with_policies(self, rounds: Sequence[Items], groups_S: Longs) -> list[Floats]:
        if self.use_kl_in_reward:
            of_rewards = super().with_policies(rounds, groups_S)
        else:
            of_rewards = [items.streams["advantage"] for items in rounds]
        return [self._mixed(own, items) for own, items in zip(of_rewards, rounds, strict=True)]

    def _mixed(self, of_reward_I: Floats, items: Items) -> Floats:
        streams = items.streams
        # k1 is the log-ratio itself, clipped: one odd token must not outweigh a batch
        gap_I = kl_of_tokens(streams[self.student], streams["teacher"], "k1")
        ahead_I = discounted(gap_I, items.sequence, self.discount)
        return (self.reward_weight * of_reward_I.astype(np.float64) - ahead_I).astype(np.float32)


def discounted(values_I: Doubles, sequence_I: Longs, discount: float) -> Doubles:
    """[I] of every item, the sum over its sequence from it on: value k ahead times discount^k."""
    if discount == 0:
        return values_I
    out = values_I.copy()
    for i in range(len(out) - 2, -1, -1):
        if sequence_I[i] == sequence_I[i + 1]:
            out[i] += discount * out[i + 1]
    return out


def loss(
    current_I: Tensor, items: LossItems, *, kl_ctl: float = 0.0, kl_estimator: Estimator = "k3"
) -> LossResult:
    """Weighted sum of -ratio A, plus the divergence from the reference.

    Metric kl_teacher: how far the policy that sampled is from the teacher, KL(sampler || teacher)
    a token, estimated by k1.
    """
    found = policy_gradient(current_I, items, kl_ctl=kl_ctl, kl_estimator=kl_estimator)
    gap = (items.streams["behaviour"] - items.streams["teacher"]) * items.weight
    return replace(found, metrics={**found.metrics, "kl_teacher": gap.sum()})
