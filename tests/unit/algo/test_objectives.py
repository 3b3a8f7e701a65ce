"""What the policy objectives have of their own, beside their closed forms.

Shapes: I items.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from lorelei.algo import cispo, clip, gspo, sapo
from lorelei.algo.dapo import Dapo
from lorelei.algo.grpo import Grpo
from lorelei.algo.kinds import KINDS, expansion
from lorelei.algo.loss import Loss, LossItems, sequence_mean
from lorelei.algo.m2po import within_second_moment
from lorelei.algo.overlong import OverlongPenalty
from lorelei.algo.rejection import RejectionSampling
from tests.episodes import rollout, turn
from tests.loss_items import some_items, with_streams, without


def gradient(loss: Loss, current: Tensor, items: LossItems, **params: Any) -> Tensor:
    x = current.clone().requires_grad_()
    loss(x, items, **params).total.backward()
    assert x.grad is not None
    return x.grad


def test_a_weight_that_is_clipped_keeps_its_tokens_gradient() -> None:
    current, items = some_items()
    items = without(items, "reference")
    weight = (current - items.streams["behaviour"]).exp().clamp(0.8, 1.2)
    got = gradient(cispo.loss, current, items, form="plain", eps_clip=0.2, eps_clip_higher=0.2)
    torch.testing.assert_close(got, -weight * items.streams["advantage"] * items.weight)


def test_the_two_forms_of_an_answers_ratio_have_one_gradient_where_it_has_one_advantage() -> None:
    """Section 4.3 of the paper."""
    current, items = some_items()
    items = without(items, "reference")
    shared = sequence_mean(items.streams["advantage"], items.sequence)
    equal = torch.full_like(items.weight, 1 / len(current))
    items = LossItems(
        weight=equal, sequence=items.sequence, streams={**items.streams, "advantage": shared}
    )
    bounds: dict[str, Any] = {"eps_clip": 0.02, "eps_clip_higher": 0.03, "form": "plain"}
    by_token = gradient(gspo.token_loss, current, items, **bounds)
    torch.testing.assert_close(by_token, gradient(gspo.loss, current, items, **bounds))
    assert (by_token == 0).any() and (by_token != 0).any()
    with_own = with_streams(items, advantage=some_items(1)[1].streams["advantage"])
    assert not torch.allclose(gradient(gspo.token_loss, current, with_own, **bounds), by_token)


def test_a_gate_is_a_ratio_where_nothing_has_moved() -> None:
    current, items = some_items()
    items = with_streams(without(items, "reference"), behaviour=current.clone())
    expected = -items.streams["advantage"] * items.weight
    for tau in (0.5, 1.0, 4.0):
        got = gradient(sapo.loss, current, items, form="plain", tau_pos=tau, tau_neg=tau)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("loss", [clip.loss, gspo.loss, gspo.token_loss, cispo.loss, sapo.loss])
def test_what_is_left_out_gives_no_gradient_whatever_its_ratio(loss: Loss) -> None:
    current, items = some_items()
    behaviour = items.streams["behaviour"].clone()
    behaviour[2], behaviour[5] = -2000.0, 900.0
    items = with_streams(without(items, "proximal", "reference"), behaviour=behaviour)
    got = gradient(loss, current, items, form="plain", upper=5.0, lower=0.01)
    assert got[2] == got[5] == 0 and torch.isfinite(got).all() and (got != 0).any()


def test_as_few_tokens_are_stale_as_keep_the_second_moment_below_its_bound() -> None:
    log_ratio = np.array([0.1, -0.9, 0.2, 0.5, -0.1], dtype=np.float32)
    for threshold, kept in ((1.0, 5), (0.1, 4), (0.05, 3), (1e-9, 1)):
        found = within_second_moment(log_ratio, threshold)
        assert found.sum() == kept
        assert not kept < 5 or not found[1]
    assert within_second_moment(log_ratio, 0.1).tolist() == [True, False, True, True, True]


def test_nearly_the_longest_answers_lose_up_to_the_factor() -> None:
    """DAPO's eq. 13 with 20 tokens of 100."""
    scores = [OverlongPenalty(buffer=20)(n, 100) for n in (1, 80, 85, 100, 300)]
    assert scores == [0, 0, -0.25, -1, -1]
    assert OverlongPenalty(factor=2.0)(90, 100) == -1.0  # a fifth


def test_lengths_change_the_scores_that_credit_is_made_of() -> None:
    long, short = (rollout(turn([1], list(range(n))), reward=1.0) for n in (10, 4))
    algo = Dapo(kind="dapo", adv_norm=None)
    kept = algo.penalised([[long, short]], 10)
    assert [values[0] for values in algo.credit(kept)[0]] == [0.0, 1.0]
    assert Grpo().penalised([[long, short]], 10) == [[long, short]]


def test_every_turn_is_judged_with_the_score_that_reaches_it() -> None:
    talk = rollout(turn([1], [2, 3]), turn([1, 2, 3, 4], [5]), reward=1.0)
    other = rollout(turn([1], [2]), reward=0.0)
    algo = Grpo(turn_discount=0.5, adv_norm=None)
    assert [v.tolist() for v in algo.credit([[talk, other]])[0]] == [[0.5, 0.5, 1.0], [0.0]]
    centred = Grpo(turn_discount=0.5, adv_norm=KINDS["dr_grpo"](kind="dr_grpo").adv_norm)
    assert [v.tolist() for v in centred.credit([[talk, other]])[0]] == [[0.0, 0.0, 0.5], [-0.5]]
    # of one turn each it changes nothing
    one = [rollout(turn([1], [2, 3]), reward=r) for r in (1.0, 0.0)]
    for got, usual in zip(algo.credit([one])[0], Grpo(adv_norm=None).credit([one])[0], strict=True):
        np.testing.assert_array_equal(got, usual)


def test_every_policy_objective_stands_in_the_table() -> None:
    page = (Path(__file__).parents[3] / "docs" / "objectives.md").read_text()
    listed = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")}
    assert {kind for kind, made in KINDS.items() if made.job == "rl"} <= listed


def test_a_preset_says_what_it_expands_to() -> None:
    def said(kind: str, **fields: Any) -> str:
        return expansion(KINDS[kind](kind=kind, **fields))

    assert said("dr_grpo") == "grpo with loss_aggregation: constant, adv_norm: {std_level: none}"
    assert said("dapo", overlong_penalty=None, kl_ctl=0.1) == (
        "grpo with kl_ctl: 0.1, drop_zero_variance_groups: true, eps_clip_higher: 0.28"
    )
    assert said("gspo").startswith("grpo with another loss, loss_aggregation: sequence, eps_clip")
    assert said("grpo", eps_clip=0.3) == said("rloo") == said("sft") == ""


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("grpo", {"c_clip": 1.1}, "c_clip: 1.1 is within the clip, which ends at 1.2; raise it"),
        ("dapo", {"loss_length": 9}, "loss_length: 9 does nothing with loss_aggregation: token;"),
        ("grpo", {"max_dropped_groups": 3}, "max_dropped_groups: 3 does nothing with drop_zero_"),
        (
            "cispo",
            {"rejection_sampling": {"upper": 2, "action": "clamp"}},
            "rejection_sampling.action: clamp bounds the weight of the decoupled loss; set use_dec",
        ),
    ],
)
def test_a_setting_without_effect_is_refused(kind: str, fields: Any, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        KINDS[kind](kind=kind, **fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"agg": "sum"}, "agg: sum does nothing with level: token; remove it"),
        ({"action": "clamp", "metric": "kl_k2"}, "metric: kl_k2 gives no weight that action: clam"),
        ({"action": "clamp", "level": "sequence", "agg": "max"}, "agg: max is no weight that"),
    ],
)
def test_bounds_that_mean_nothing_are_refused(fields: Any, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        RejectionSampling(upper=2.0, **fields)
