"""Losses on preferences against their papers' formulas in plain floats.

A kind that compares answers needs an entry in COMPARED; the formulas share no code with
`lorelei.algo`. Shapes: I items.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor

from lorelei.algo.kinds import algorithm
from lorelei.algo.loss import Loss, LossItems, LossResult, load_loss
from tests.loss_items import taken

Fields = Mapping[str, Any]
KL = 0.7  # of the batch, for KTO
CHOSEN, REJECTED = (3, 1, 5), (2, 4, 1)  # tokens of each pair's answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer to a prompt: log-probabilities of its tokens."""

    sign: int
    current: Sequence[float]
    reference: Sequence[float]

    @property
    def ratio(self) -> float:
        return sum(self.current) - sum(self.reference)


Form = Callable[[Sequence[Answer], Fields], float]


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def dpo(answers: Sequence[Answer], fields: Fields) -> float:
    """Rafailov et al. (arXiv 2305.18290), eq. 7; cDPO; SLiC's hinge (arXiv 2305.10425)."""
    chosen, rejected = answers
    margin = fields.get("beta", 0.1) * (chosen.ratio - rejected.ratio)
    if fields.get("loss_type") == "hinge":
        return max(0.0, 1 - margin)
    e = fields.get("label_smoothing", 0.0)
    return -(1 - e) * log_sigmoid(margin) - e * log_sigmoid(-margin)


def ipo(answers: Sequence[Answer], fields: Fields) -> float:
    """Azar et al. (arXiv 2310.12036), eq. 17, with means."""
    chosen, rejected = (a.ratio / len(a.current) for a in answers)
    return (chosen - rejected - 1 / (2 * fields.get("beta", 0.1))) ** 2


def kto(answers: Sequence[Answer], fields: Fields) -> float:
    """Ethayarajh et al. (arXiv 2402.01306), eq. 8."""
    (one,) = answers
    beta, names = fields.get("beta", 0.1), ("desirable_weight", "undesirable_weight")
    value = 1 / (1 + math.exp(-beta * one.sign * (one.ratio - KL)))
    return fields.get(names[one.sign < 0], 1.0) * (1 - value)


def orpo(answers: Sequence[Answer], fields: Fields) -> float:
    """Hong et al. (arXiv 2403.07691), eq. 6 and 7."""
    chosen, rejected = (math.exp(fmean(a.current)) for a in answers)
    ratio = math.log(chosen / (1 - chosen)) - math.log(rejected / (1 - rejected))
    return -math.log(chosen) - fields.get("beta", 0.1) * log_sigmoid(ratio)


def simpo(answers: Sequence[Answer], fields: Fields) -> float:
    """Meng et al. (arXiv 2405.14734), eq. 6."""
    chosen, rejected = (fmean(a.current) for a in answers)
    margin = fields.get("beta", 2.0) * (chosen - rejected)
    return -log_sigmoid(margin - fields.get("gamma", 1.0))


COMPARED: Mapping[str, tuple[Form, Sequence[Fields]]] = {
    "dpo": (dpo, [{}, {"beta": 0.7, "label_smoothing": 0.2}, {"loss_type": "hinge"}]),
    "ipo": (ipo, [{}, {"beta": 0.5}]),
    "kto": (kto, [{}, {"beta": 0.5, "desirable_weight": 2.0, "undesirable_weight": 0.5}]),
    "orpo": (orpo, [{}, {"beta": 0.6}]),
    "simpo": (simpo, [{}, {"beta": 1.0, "gamma": 0.3}]),
}
CASES = [(kind, fields) for kind, (_, cases) in COMPARED.items() for fields in cases]


def some_answers(paired: bool) -> list[list[Answer]]:
    """Comparisons whose answers have different lengths and near references."""
    draw = torch.Generator().manual_seed(0)

    def answer(sign: int, length: int) -> Answer:
        reference = torch.rand(length, generator=draw, dtype=torch.float64) * -3 - 0.1
        moved = torch.randn(length, generator=draw, dtype=torch.float64) * 0.4
        current = (reference + moved).clamp(max=-0.01)
        return Answer(sign=sign, current=current.tolist(), reference=reference.tolist())

    pairs = [[answer(1, a), answer(-1, b)] for a, b in zip(CHOSEN, REJECTED, strict=True)]
    return pairs if paired else [[one] for pair in pairs for one in pair]


def read(compared: Sequence[Sequence[Answer]]) -> tuple[Tensor, LossItems]:
    """(current_I, items) in fp64; every comparison weighs the same, its items share its weight."""
    rows = [
        (number, one.sign, current, reference, 1 / len(compared) / sum(len(a.current) for a in own))
        for number, own in enumerate(compared)
        for one in own
        for current, reference in zip(one.current, one.reference, strict=True)
    ]
    sequence, sign, current, reference, weight = (
        torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True)
    )
    streams = {"answer": sign, "reference": reference, "kl": torch.full_like(sign, KL)}
    return current, LossItems(weight=weight, sequence=sequence.long() * 3 + 2, streams=streams)


def of(kind: str, fields: Fields) -> tuple[Loss, Mapping[str, Any], list[list[Answer]]]:
    spec = algorithm({"kind": kind, **fields}).loss()
    return load_loss(spec), spec.params, some_answers(paired=kind != "kto")


@pytest.mark.parametrize(("kind", "fields"), CASES, ids=str)
def test_the_loss_is_the_formula(kind: str, fields: Fields) -> None:
    loss, params, compared = of(kind, fields)
    current, items = read(compared)
    form = COMPARED[kind][0]
    expected = fmean(form(answers, fields) for answers in compared)
    assert loss(current, items, **params).total.item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("kind", "fields"), CASES, ids=str)
def test_gradients_are_those_of_finite_differences(kind: str, fields: Fields) -> None:
    loss, params, compared = of(kind, fields)
    current, items = read(compared)
    current.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, items, **params).total, current)


@pytest.mark.parametrize(("kind", "fields"), CASES, ids=str)
def test_a_loss_is_additive_over_comparisons_in_any_order(kind: str, fields: Fields) -> None:
    loss, params, compared = of(kind, fields)
    current, items = read(compared)
    mixed = torch.randperm(len(current), generator=torch.Generator().manual_seed(1))
    current, items = current[mixed], taken(items, mixed)
    whole = loss(current, items, **params)
    first = items.sequence == items.sequence.min()
    parts: list[LossResult] = []
    for index in (first.nonzero()[:, 0], (~first).nonzero()[:, 0]):
        parts.append(loss(current[index], taken(items, index), **params))
    torch.testing.assert_close(whole.total, parts[0].total + parts[1].total)
    for name, value in whole.metrics.items():
        torch.testing.assert_close(value, parts[0].metrics[name] + parts[1].metrics[name])


def test_an_adapter_that_has_not_moved_is_half_right_and_has_a_gradient() -> None:
    """Where rewards are all zero, as at the start, the slope of the logistic loss is one half."""
    loss, params, compared = of("dpo", {})
    still = [[replace(one, current=one.reference) for one in pair] for pair in compared]
    current, items = read(still)
    current.requires_grad_()
    result = loss(current, items, **params)
    (slope,) = torch.autograd.grad(result.total, current)
    assert (result.total.item(), result.metrics["accuracy"].item()) == pytest.approx(
        (math.log(2), 0.5)
    )
    torch.testing.assert_close(slope, items.streams["answer"] * (-0.5 * 0.1 / len(compared)))


def test_metrics_are_means_over_pairs() -> None:
    loss, params, compared = of("dpo", {"beta": 0.5})
    found = {name: value.item() for name, value in loss(*read(compared), **params).metrics.items()}
    rewards = [[0.5 * answer.ratio for answer in pair] for pair in compared]
    assert found == pytest.approx(
        {
            "accuracy": fmean(chosen > rejected for chosen, rejected in rewards),
            "margin": fmean(chosen - rejected for chosen, rejected in rewards),
            "chosen_reward": fmean(chosen for chosen, _ in rewards),
            "rejected_reward": fmean(rejected for _, rejected in rewards),
            "chosen_logprob": fmean(sum(pair[0].current) for pair in compared),
            "rejected_logprob": fmean(sum(pair[1].current) for pair in compared),
        }
    )
