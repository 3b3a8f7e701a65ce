"""The forms of the clipped loss against the clipped surrogate written by hand.

Shapes: I items.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from lorelei.algo import clip
from lorelei.algo.loss import Loss, LossItems
from tests.loss_items import some_items, taken, with_streams, without

decoupled_loss, recomputed_loss, plain_loss = FORMS = tuple(
    partial(clip.loss, form=form) for form in ("decoupled", "recomputed", "plain")
)


def clipped_by_hand(ratio: float, advantage: float, low: float, high: float) -> float:
    """-min(ratio A, clip(ratio) A)."""
    return -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.keywords["form"])
@pytest.mark.parametrize("high", [None, 0.5])
def test_every_form_is_the_clipped_surrogate_written_by_hand(
    form: Loss, high: float | None
) -> None:
    current, items = some_items()
    items = without(items, "reference")
    bounds = {} if high is None else {"eps_clip_higher": high}
    result = form(current, items, eps_clip=0.2, **bounds)
    proximal, behaviour = (items.streams[name] for name in ("proximal", "behaviour"))
    columns = (current, proximal, behaviour, items.streams["advantage"], items.weight)
    expected = clipped = 0.0
    outside = 0
    for c, p, b, advantage, weight in zip(*(x.tolist() for x in columns), strict=True):
        ratio = math.exp(c - (b if form is plain_loss else p))
        correction = math.exp(p - b) if form is decoupled_loss else 1.0
        expected += weight * correction * clipped_by_hand(ratio, advantage, 0.2, high or 0.2)
        if not 0.8 <= ratio <= 1 + (high or 0.2):
            outside += 1
            clipped += weight
    assert 0 < outside < len(current)
    assert result.total.item() == pytest.approx(expected, rel=1e-12)
    assert result.metrics["clipped"].item() == pytest.approx(clipped, rel=1e-12)
    assert result.metrics["rejected"].item() == 0


def test_the_upper_clip_alone_lets_good_tokens_rise_further() -> None:
    """DAPO (arXiv 2503.14476): between 1 + eps and 1 + eps_higher there is still a gradient."""
    current = torch.tensor([math.log(1.25), math.log(1.35), math.log(0.75)], dtype=torch.float64)
    zeros = torch.zeros_like(current)
    advantage = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    items = LossItems(
        weight=torch.ones_like(current),
        streams={"advantage": advantage, "behaviour": zeros, "proximal": zeros},
        sequence=torch.arange(3),
    )
    for higher, expected in (({}, [0.0, 0.0, 0.0]), ({"eps_clip_higher": 0.28}, [-1.25, 0.0, 0.0])):
        x = current.clone().requires_grad_()
        decoupled_loss(x, items, eps_clip=0.2, **higher).total.backward()
        assert x.grad is not None
        assert x.grad.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.keywords["form"])
def test_gradients_are_those_of_finite_differences_where_tokens_are_rejected(form: Loss) -> None:
    current, items = some_items()
    current.requires_grad_()
    bounds = {"upper": 1.2, "lower": 0.8}
    assert torch.autograd.gradcheck(lambda x: form(x, items, **bounds).total, current)


def test_plain_and_decoupled_agree_when_the_proximal_policy_sampled() -> None:
    current, items = some_items()
    items = with_streams(items, proximal=items.streams["behaviour"])
    found: list[tuple[Tensor, Tensor | None]] = []
    for form in (decoupled_loss, plain_loss):
        x = current.clone().requires_grad_()
        total = form(x, items, kl_ctl=0.1).total
        total.backward()
        found.append((total, x.grad))
    torch.testing.assert_close(found[0], found[1])


def test_the_recomputed_ratio_ignores_what_the_sampler_says() -> None:
    current, items = some_items()
    lies = with_streams(items, behaviour=items.streams["behaviour"] + 3.0)
    totals = [recomputed_loss(current, i).total for i in (items, lies)]
    assert totals[0] == totals[1]
    honest = with_streams(items, behaviour=items.streams["proximal"])  # then all forms are one
    torch.testing.assert_close(totals[0], plain_loss(current, honest).total)


def test_without_a_proximal_policy_the_current_one_is_it() -> None:
    current, items = some_items()
    items = without(items, "reference")
    gradients: list[Tensor] = []
    for one in (without(items, "proximal"), with_streams(items, proximal=current.clone())):
        x = current.clone().requires_grad_()
        decoupled_loss(x, one).total.backward()
        assert x.grad is not None
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    # the ratio is 1, so nothing is clipped: REINFORCE with importance weights
    weight = (current - items.streams["behaviour"]).exp() * items.weight
    torch.testing.assert_close(gradients[0], -items.streams["advantage"] * weight)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.keywords["form"])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_rejected_item_gives_no_gradient_even_when_its_ratio_is_infinite(
    form: Loss, advantage: float
) -> None:
    current, items = some_items()
    behaviour = items.streams["behaviour"].clone()
    behaviour[2], behaviour[5] = -2000.0, 900.0  # ratios of infinity and of zero
    items = with_streams(
        without(items, "proximal"),
        advantage=torch.full_like(current, advantage),
        behaviour=behaviour,
        reference=torch.full_like(current, -3000.0),
    )
    x = current.clone().requires_grad_()
    result = form(x, items, kl_ctl=0.1, upper=5.0, lower=0.01)
    result.total.backward()
    assert x.grad is not None
    assert x.grad[2] == x.grad[5] == 0
    assert torch.isfinite(x.grad).all() and (x.grad != 0).sum() == len(x) - 2
    assert result.metrics["rejected"].item() == pytest.approx(
        (items.weight[2] + items.weight[5]).item()
    )
    # the others are as if the rejected ones were not there
    rest = torch.tensor([i for i in range(len(x)) if i not in (2, 5)])
    y = current[rest].clone().requires_grad_()
    form(y, taken(items, rest), kl_ctl=0.1).total.backward()
    torch.testing.assert_close(x.grad[rest], y.grad)
