"""What an algorithm is: settings, and the functions that follow from them, in one file.

Every class below `Algorithm` in a file of this folder whose `kind` is a Literal is an algorithm; so
is one in a file of a user's (`kind: my_file.py:MyClass`).
Shapes: S rollouts of one adapter's batch, T sampled tokens of a rollout, in the order of its turns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from lorelei.algo.advantage import Level, NormConfig
from lorelei.algo.frozen import WithReference
from lorelei.algo.kl_reward import kl_of_tokens, to_go
from lorelei.algo.loss import Aggregation, Estimator
from lorelei.algo.overlong import OverlongPenalty
from lorelei.config.errors import FieldError
from lorelei.config.section import Section
from lorelei.types import BASE, Floats, Items, Longs, LossSpec, Policy, Rollout

Job = Literal["rl", "sft", "preference"]


class Algorithm(Section):
    """How one adapter learns: every field of a subclass has an effect on what it does."""

    job: ClassVar[Job]  # the kind of job that feeds it
    answers: ClassVar[int] = 1  # to one prompt, of a row that is given

    kind: Any  # a Literal in each algorithm
    batch_size: int = Field(default=4, ge=1, description="Prompts (groups), or rows, of one step.")

    def loss(self) -> LossSpec:
        """The loss, its frozen parameters and the streams that it reads."""
        raise NotImplementedError

    @property
    def policies(self) -> Mapping[str, Policy]:
        """{stream: the policy whose log-probabilities fill it before the first update}."""
        return {}

    @property
    def needs_reward(self) -> bool:
        """Whether it learns from what scores its rollouts."""
        return self.job == "rl"


class PolicyAlgorithm(WithReference, Algorithm):
    """From the rewards of groups of rollouts to a policy gradient."""

    job = "rl"
    # whether a greedy answer to each prompt is scored beside its samples: Rollout.baseline
    greedy_baseline: ClassVar[bool] = False

    ppo_n_minibatches: int = Field(default=1, ge=1, description="Optimizer steps of one step.")
    kl_ctl: float = Field(
        default=0.0, ge=0, description="Weight of the divergence from `reference`."
    )
    use_kl_in_reward: bool = Field(
        default=False,
        description="Subtract the divergence from tokens' rewards. false: add it to the loss.",
    )
    kl_estimator: Estimator = Field(
        default="k3",
        description="How a token's divergence is estimated. In the loss, k1 has no gradient on "
        "average.",
    )
    loss_aggregation: Aggregation = Field(
        default="token",
        description="Every token, or every rollout, has the same weight; constant: a token's does "
        "not depend on how many there are.",
    )
    loss_length: int | None = Field(
        default=None,
        ge=1,
        description="The tokens of a rollout that has one rollout's share, with constant. "
        "Default: rollout.max_new_tokens.",
    )
    reward_scaling: float = Field(default=1.0, description="reward = score * scaling.")
    overlong_penalty: OverlongPenalty | None = Field(
        default=None, description="Of scores of answers that are nearly as long as they may be."
    )
    turn_discount: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Every turn counts as a rollout, with the score times this for every turn "
        "behind it. 1: all turns of a rollout share one advantage.",
    )
    reward_norm: NormConfig | None = Field(default=None, description="Normalise rewards.")
    adv_norm: NormConfig | None = Field(
        default_factory=NormConfig, description="Normalise advantages. Default: by group."
    )
    drop_zero_variance_groups: bool = Field(
        default=False, description="Sample another group for one whose rewards are all equal."
    )
    max_dropped_groups: int | None = Field(
        default=None,
        ge=0,
        description="How many of them one batch may drop; more are trained on. Default: any "
        "number.",
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

    @model_validator(mode="after")
    def _kl_has_effects(self) -> PolicyAlgorithm:
        if self.use_kl_in_reward and self.kl_ctl == 0:
            raise FieldError(
                "use_kl_in_reward", "true does nothing with kl_ctl: 0; raise it, or remove this"
            )
        if self.reference != BASE and self.kl_ctl == 0:
            raise FieldError(
                "reference",
                f"{self.reference!r} does nothing with kl_ctl: 0; raise it, or remove this",
            )
        if self.kl_estimator != "k3" and self.kl_ctl == 0:
            raise FieldError(
                "kl_estimator",
                f"{self.kl_estimator} does nothing with kl_ctl: 0; raise it, or remove this",
            )
        return self

    @model_validator(mode="after")
    def _belongs_to_another(self) -> PolicyAlgorithm:
        if self.loss_length is not None and self.loss_aggregation != "constant":
            raise FieldError(
                "loss_length",
                f"{self.loss_length} does nothing with loss_aggregation: {self.loss_aggregation}; "
                "set that to constant, or remove this",
            )
        if self.max_dropped_groups is not None and not self.drop_zero_variance_groups:
            raise FieldError(
                "max_dropped_groups",
                f"{self.max_dropped_groups} does nothing with drop_zero_variance_groups: false; "
                "set that to true, or remove this",
            )
        return self

    @property
    def statistics(self) -> frozenset[Level]:
        """Over which levels statistics of rollouts are taken."""
        norms = [norm for norm in (self.reward_norm, self.adv_norm) if norm is not None]
        return frozenset(level for norm in norms for level in norm.levels)

    @property
    def policies(self) -> Mapping[str, Policy]:
        return {"reference": self.reference} if self.kl_ctl > 0 else {}

    @property
    def loss_kl(self) -> float:
        """The weight of the divergence in the loss."""
        return 0.0 if self.use_kl_in_reward else self.kl_ctl

    def kl_params(self) -> dict[str, Any]:
        """The parameters of a loss that adds the divergence."""
        params: dict[str, Any] = {"kl_ctl": self.loss_kl}
        if self.loss_kl and self.kl_estimator != "k3":
            params["kl_estimator"] = self.kl_estimator
        return params

    def penalised(
        self, groups: Sequence[Sequence[Rollout]], max_new_tokens: int
    ) -> Sequence[Sequence[Rollout]]:
        """The rollouts with the scores that their lengths leave them."""
        if self.overlong_penalty is None:
            return groups
        penalty = self.overlong_penalty
        return [
            [
                replace(r, reward=(r.reward or 0.0) + penalty(r.sampled_tokens, max_new_tokens))
                for r in group
            ]
            for group in groups
        ]

    def scaled(self, scores_S: Floats) -> Floats:
        """[S] rewards, of what scorers gave."""
        return (scores_S * self.reward_scaling).astype(np.float32)

    def baseline(self, values_S: Floats, groups_S: Longs) -> Floats:
        """[S] the rewards less what was expected of them; by itself, unchanged."""
        return values_S

    def advantages(
        self, scores_S: Floats, groups_S: Longs, tokens_S: Longs | None = None
    ) -> Floats:
        """[S] scale and normalise rewards, subtract a baseline, normalise.

        tokens_S: how many tokens were sampled in each; None: one. With `use_kl_in_reward` the last
        part is left to `with_kl`.
        """
        values = self.scaled(scores_S)
        if self.reward_norm is not None:
            values = self.reward_norm(values, groups_S, _weights(self.reward_norm, tokens_S))
        values = self.baseline(values, groups_S)
        if self.adv_norm is not None and not self.use_kl_in_reward:
            values = self.adv_norm(values, groups_S, _weights(self.adv_norm, tokens_S))
        return values

    def credit(self, groups: Sequence[Sequence[Rollout]]) -> list[list[Floats]]:
        """The advantage [T] of every sampled token of every rollout, by group.

        groups: rollouts with a reward. A rollout's tokens share its advantage unless a subclass
        has something better to say.
        """
        # with a discount every turn is judged alone, else all of a rollout are
        judged = partial(_turns, self.turn_discount) if self.turn_discount < 1 else _whole
        parts = [[judged(r) for r in group] for group in groups]
        flat = [part for group in parts for own in group for part in own]
        rewards = np.array([reward for reward, _ in flat], dtype=np.float32)
        counts = [sum(map(len, group)) for group in parts]
        groups_S = np.repeat(np.arange(len(groups)), counts)
        tokens_S = np.array([tokens for _, tokens in flat])
        values = iter(self.advantages(rewards, groups_S, tokens_S))
        return [
            [
                np.concatenate([np.full(n, next(values), dtype=np.float32) for _, n in own])
                for own in group
            ]
            for group in parts
        ]

    @property
    def credit_reads_policies(self) -> bool:
        """Whether advantages follow from log-probabilities of policies: see `with_policies`."""
        return self.use_kl_in_reward

    def with_policies(self, rounds: Sequence[Items], groups_S: Longs) -> list[Floats]:
        """The stream `advantage` of the rounds of one batch, with `credit_reads_policies`.

        rounds: of `credit`, with the streams of `policies`. groups_S: the number of the group of
        every rollout of the batch.
        """
        return self.with_kl(rounds, groups_S)

    def with_kl(self, rounds: Sequence[Items], groups_S: Longs) -> list[Floats]:
        """The stream `advantage` of the rounds of one batch, with `use_kl_in_reward`.

        See `with_policies`. A token's advantage is less the divergence from it on.
        """
        sequences: list[Longs] = []
        for items in rounds:
            begun = int(sequences[-1][-1]) + 1 if sequences else 0
            sequences.append(items.sequence + begun)
        sequence_I = np.concatenate(sequences)

        def stream(name: str) -> Floats:
            return np.concatenate([items.streams[name] for items in rounds])

        kl_I = kl_of_tokens(stream(self.kl_policy), stream("reference"), self.kl_estimator)
        values_I = stream("advantage") - to_go(self.kl_ctl * kl_I, sequence_I)
        if self.adv_norm is None:
            found = values_I.astype(np.float32)
        else:
            weights_I = None
            if self.adv_norm.weigh_by == "rollout":  # its tokens share its weight
                weights_I = 1 / np.bincount(sequence_I)[sequence_I]
            found = self.adv_norm(values_I, groups_S[sequence_I], weights_I)
        return np.split(found, np.cumsum([len(items) for items in rounds])[:-1])

    @property
    def kl_policy(self) -> str:
        """The stream of the policy whose divergence is a part of the rewards."""
        return "behaviour"


def _whole(rollout: Rollout) -> list[tuple[float, int]]:
    """Its reward and its sampled tokens."""
    assert rollout.reward is not None, "only rollouts with a reward are trained on"
    return [(rollout.reward, rollout.sampled_tokens)]


def _turns(discount: float, rollout: Rollout) -> list[tuple[float, int]]:
    """The same of each of its turns that has tokens."""
    ((reward, _),) = _whole(rollout)
    last = len(rollout.turns) - 1
    found = [
        (reward * discount ** (last - number), len(turn.completion.tokens))
        for number, turn in enumerate(rollout.turns)
    ]
    return [(value, tokens) for value, tokens in found if tokens]


def _weights(norm: NormConfig, tokens_S: Longs | None) -> Longs | None:
    return tokens_S if norm.weigh_by == "token" else None
