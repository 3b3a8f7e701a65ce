"""What an algorithm is: settings, and the functions that follow from them, in one file.

Every class below `Algorithm` in a file of this folder whose `kind` is a Literal is an algorithm; so
is one in a file of a user's (`kind: my_file.py:MyClass`).
Shapes: S rollouts of one adapter's batch, T sampled tokens of a rollout, in the order of its turns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from lorelei.algo.advantage import Level, NormConfig
from lorelei.algo.loss import Aggregation
from lorelei.config.errors import FieldError
from lorelei.config.section import Section
from lorelei.types import BASE, Floats, Longs, LossSpec, Policy, Rollout

Job = Literal["rl", "sft"]


class Algorithm(Section):
    """How one adapter learns: every field of a subclass has an effect on what it does."""

    job: ClassVar[Job]  # the kind of job that feeds it

    kind: Any  # a Literal in each algorithm
    batch_size: int = Field(default=4, ge=1, description="Prompts (groups), or rows, of one step.")

    def loss(self) -> LossSpec:
        """The loss, its frozen parameters and the streams that it reads."""
        raise NotImplementedError

    @property
    def policies(self) -> Mapping[str, Policy]:
        """{stream: the policy whose log-probabilities fill it before the first update}."""
        return {}


class PolicyAlgorithm(Algorithm):
    """From the rewards of groups of rollouts to a policy gradient."""

    job = "rl"

    ppo_n_minibatches: int = Field(default=1, ge=1, description="Optimizer steps of one step.")
    kl_ctl: float = Field(default=0.0, ge=0, description="Weight of the divergence from the base.")
    loss_aggregation: Aggregation = Field(
        default="token", description="Every token, or every rollout, has the same weight."
    )
    reward_scaling: float = Field(default=1.0, description="reward = score * scaling.")
    reward_norm: NormConfig | None = Field(default=None, description="Normalise rewards.")
    adv_norm: NormConfig | None = Field(
        default_factory=NormConfig, description="Normalise advantages. Default: by group."
    )
    drop_zero_variance_groups: bool = Field(
        default=False, description="Sample another group for one whose rewards are all equal."
    )

    @model_validator(mode="after")
    def _divides(self) -> PolicyAlgorithm:
        if self.batch_size % self.ppo_n_minibatches:
            raise FieldError(
                "ppo_n_minibatches",
                f"{self.ppo_n_minibatches} does not divide batch_size: {self.batch_size}; "
                "use a divisor of it",
            )
        return self

    @property
    def statistics(self) -> frozenset[Level]:
        """Over which levels statistics of rollouts are taken."""
        norms = [norm for norm in (self.reward_norm, self.adv_norm) if norm is not None]
        return frozenset(level for norm in norms for level in norm.levels)

    @property
    def policies(self) -> Mapping[str, Policy]:
        return {"reference": BASE} if self.kl_ctl > 0 else {}

    def scaled(self, scores_S: Floats) -> Floats:
        """[S] rewards, of what scorers gave."""
        return (scores_S * self.reward_scaling).astype(np.float32)

    def baseline(self, values_S: Floats, groups_S: Longs) -> Floats:
        """[S] the rewards less what was expected of them; by itself, unchanged."""
        return values_S

    def advantages(self, scores_S: Floats, groups_S: Longs) -> Floats:
        """[S] scale and normalise rewards, subtract a baseline, normalise."""
        values = self.scaled(scores_S)
        if self.reward_norm is not None:
            values = self.reward_norm(values, groups_S)
        values = self.baseline(values, groups_S)
        if self.adv_norm is not None:
            values = self.adv_norm(values, groups_S)
        return values

    def credit(self, groups: Sequence[Sequence[Rollout]]) -> list[list[Floats]]:
        """The advantage [T] of every sampled token of every rollout, by group.

        groups: rollouts with a reward. A rollout's tokens share its advantage unless a subclass
        has something better to say.
        """
        rewards = np.array([r.reward for group in groups for r in group], dtype=np.float32)
        groups_S = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        values = iter(self.advantages(rewards, groups_S))
        return [
            [np.full(r.sampled_tokens, next(values), dtype=np.float32) for r in group]
            for group in groups
        ]
