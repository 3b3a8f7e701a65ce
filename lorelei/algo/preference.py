"""What objectives on preferences share: answers to one prompt, and what is thought of them.

The answers that are compared have one `sequence` number, so that no micro-batch parts them; the
stream `answer` tells them apart: +1 for what is chosen (or desirable), -1 for what is rejected (or
undesirable). A comparison's weight is the sum of its items' weights.
Shapes: I items, S comparisons, L items of the longest one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lorelei.algo.algorithm import Algorithm
from lorelei.algo.frozen import WithReference
from lorelei.algo.loss import LossItems, LossResult
from lorelei.types import Policy

if TYPE_CHECKING:
    from torch import Tensor

CHOSEN, REJECTED = 1, -1


class PreferenceAlgorithm(Algorithm):
    """From answers that are compared to a loss on their log-probabilities."""

    job = "preference"
    answers = 2
    paired: ClassVar[bool] = True  # rows hold two answers; False: one, and a label


class ReferencedAlgorithm(WithReference, PreferenceAlgorithm):
    """A preference objective whose rewards are log-ratios to a frozen policy."""

    @property
    def policies(self) -> Mapping[str, Policy]:
        return {"reference": self.reference}


@dataclass(frozen=True, slots=True)
class Comparisons:
    """Which items belong to which comparison, a row each, padded to the longest."""

    index_SL: Tensor
    chosen_SL: Tensor  # masks
    rejected_SL: Tensor

    def chosen(self, values_I: Tensor) -> Tensor:
        """[S] sums over the items of what is chosen."""
        return self._sums(values_I, self.chosen_SL)

    def rejected(self, values_I: Tensor) -> Tensor:
        """[S] sums over the items of what is rejected."""
        return self._sums(values_I, self.rejected_SL)

    def both(self, values_I: Tensor) -> Tensor:
        """[S] sums over all items."""
        return self._sums(values_I, self.chosen_SL | self.rejected_SL)

    def means(self, values_I: Tensor) -> tuple[Tensor, Tensor]:
        """[S] means over the items of what is chosen, and of what is rejected."""
        chosen_S = self.chosen(values_I) / self.chosen_SL.sum(-1)
        return chosen_S, self.rejected(values_I) / self.rejected_SL.sum(-1)

    def _sums(self, values_I: Tensor, mask_SL: Tensor) -> Tensor:
        return values_I[self.index_SL].where(mask_SL, values_I.new_zeros(())).sum(-1)


def comparisons(items: LossItems) -> Comparisons:
    """Of one adapter's items in one micro-batch. The order of sums follows from that of items."""
    sequence_I, answer_I = items.sequence, items.streams["answer"]
    counts_S = (sequence_I - sequence_I.min()).bincount()
    counts_S = counts_S[counts_S > 0]
    place_L = sequence_I.new_ones(int(counts_S.max())).cumsum(0) - 1
    held_SL = place_L < counts_S[:, None]
    starts_S = counts_S.cumsum(0) - counts_S
    order_I = sequence_I.argsort(stable=True)
    index_SL = order_I[(starts_S[:, None] + place_L).clamp(max=len(order_I) - 1)]
    sign_SL = answer_I[index_SL]
    return Comparisons(
        index_SL=index_SL,
        chosen_SL=held_SL & (sign_SL > 0),
        rejected_SL=held_SL & (sign_SL < 0),
    )


def pair_result(
    current_I: Tensor, items: LossItems, loss_S: Tensor, rewards: tuple[Tensor, Tensor]
) -> LossResult:
    """The weighted sum of the losses of pairs, and what is reported of them.

    rewards: [S] of what is chosen and of what is rejected; a pair whose rewards are equal is half
    right.
    """
    found = comparisons(items)
    chosen_S, rejected_S = (reward.detach() for reward in rewards)
    margin_S, seen_I = chosen_S - rejected_S, current_I.detach()
    weight_S = found.both(items.weight)
    reported = {
        "accuracy": right(margin_S),
        "margin": margin_S,
        "chosen_reward": chosen_S,
        "rejected_reward": rejected_S,
        "chosen_logprob": found.chosen(seen_I),
        "rejected_logprob": found.rejected(seen_I),
    }
    return LossResult(
        total=(loss_S * weight_S).sum(),
        metrics={name: (value_S * weight_S).sum() for name, value_S in reported.items()},
    )


def right(margin_S: Tensor) -> Tensor:
    """1 where a margin is positive, 0 where it is negative, one half for none."""
    return (margin_S.sign() + 1) / 2


def minus_log_sigmoid(x: Tensor) -> Tensor:
    """-log(sigmoid(x)), without overflow."""
    return (-x).logaddexp(x.new_zeros(()))
