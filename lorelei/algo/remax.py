"""ReMax: REINFORCE with the reward of the greedy answer as the baseline.

Source: Li et al., 2023 (arXiv 2310.10505), eq. 4. The loss is rloo's: -ratio A, with the ratio to
what was sampled from, which is 1 on policy; A = reward - reward of the greedy answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from pydantic import Field

from lorelei.algo.advantage import NormConfig
from lorelei.algo.algorithm import PolicyAlgorithm
from lorelei.algo.loss import loss_path
from lorelei.algo.rloo import loss
from lorelei.types import Floats, LossSpec, Rollout


class Remax(PolicyAlgorithm):
    """Each reward less that of the greedy answer; one sample of a prompt is enough."""

    greedy_baseline = True

    kind: Literal["remax"] = Field(description="Which algorithm.")
    adv_norm: NormConfig | None = Field(
        default=None,
        description="Normalise advantages. Default: not, the baseline is the normalisation.",
    )

    def credit(self, groups: Sequence[Sequence[Rollout]]) -> list[list[Floats]]:
        return super().credit([[_centred(rollout) for rollout in group] for group in groups])

    def loss(self) -> LossSpec:
        streams = ("advantage", "behaviour")
        return LossSpec(path=loss_path(loss), params=self.kl_params(), streams=streams)


def _centred(rollout: Rollout) -> Rollout:
    assert rollout.reward is not None and rollout.baseline is not None, "see greedy_baseline"
    return replace(rollout, reward=rollout.reward - rollout.baseline)
