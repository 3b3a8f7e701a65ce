"""What every algorithm computes from rollouts, against its paper's formula in plain floats.

A new kind needs an entry in FORMS; the formulas share no code with `lorelei.algo`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import pytest
import torch

from lorelei.algo.algorithm import Algorithm, PolicyAlgorithm
from lorelei.algo.kinds import KINDS, algorithm
from lorelei.algo.loss import LossItems, item_weights, load_loss
from lorelei.types import CURRENT
from tests.episodes import rollout, turn
from tests.unit.algo.test_preference_forms import COMPARED

REWARDS = [[1.0, 0.0, 0.25], [2.0, -1.0]]  # by group
LENGTHS = [[3, 1, 2], [2, 4]]  # tokens of the rollouts
GROUPS = [
    [rollout(turn([1, 2], list(range(n))), reward=r) for r, n in zip(rs, ns, strict=True)]
    for rs, ns in zip(REWARDS, LENGTHS, strict=True)
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """What a formula may read of a token; logarithms of probabilities."""

    rewards: Sequence[float]  # of its group
    own: int  # which of them is its rollout's
    current: float
    behaviour: float
    proximal: float
    reference: float

    @property
    def reward(self) -> float:
        return self.rewards[self.own]


Fields = Mapping[str, Any]
Form = Callable[[Token, Fields], float]


def kl(token: Token, fields: Fields) -> float:
    """kl_ctl * k3 (Schulman, 2020)."""
    log_ratio = token.reference - token.current
    return fields.get("kl_ctl", 0.0) * (math.exp(log_ratio) - 1 - log_ratio)


def grpo(token: Token, fields: Fields) -> float:
    """Shao et al. (arXiv 2402.03300), eq. 3; decoupled: Hilton et al. (arXiv 2110.00641)."""
    advantage = (token.reward - fmean(token.rewards)) / (pstdev(token.rewards) + 1e-6)
    decoupled = fields.get("use_decoupled_loss", True)
    recomputed = decoupled or fields.get("recompute_logprob", False)
    # with one optimizer step a batch nothing has moved since its start
    proximal = token.proximal if fields.get("ppo_n_minibatches", 1) > 1 else token.current
    ratio = math.exp(token.current - (proximal if recomputed else token.behaviour))
    low = fields.get("eps_clip", 0.2)
    clipped = min(max(ratio, 1 - low), 1 + fields.get("eps_clip_higher", low))
    correction = math.exp(proximal - token.behaviour)
    loss = -min(ratio * advantage, clipped * advantage) * (correction if decoupled else 1.0)
    bounds = fields.get("rejection_sampling", {})
    if not bounds.get("lower", 0.0) <= correction <= bounds.get("upper", math.inf):
        return 0.0
    return loss + kl(token, fields)


def rloo(token: Token, fields: Fields) -> float:
    """Ahmadian et al. (arXiv 2402.14740), eq. 7, with the ratio to what was sampled from."""
    others = [r for number, r in enumerate(token.rewards) if number != token.own]
    advantage = token.reward - fmean(others)
    return -math.exp(token.current - token.behaviour) * advantage + kl(token, fields)


def sft(token: Token, fields: Fields) -> float:
    """Ouyang et al. (arXiv 2203.02155), section 3.5: negative log-likelihood."""
    return -token.current


FORMS: Mapping[str, tuple[Form, Sequence[Fields]]] = {
    "grpo": (
        grpo,
        [
            {},
            {"ppo_n_minibatches": 2},
            {"ppo_n_minibatches": 2, "eps_clip": 0.1, "eps_clip_higher": 0.3, "kl_ctl": 0.5},
            {"ppo_n_minibatches": 2, "rejection_sampling": {"upper": 1.1, "lower": 0.8}},
            {"use_decoupled_loss": False},
            {"use_decoupled_loss": False, "recompute_logprob": True, "ppo_n_minibatches": 2},
        ],
    ),
    "rloo": (rloo, [{}, {"kl_ctl": 0.5}]),
    "sft": (sft, [{}]),
}
CASES = [(kind, fields) for kind, (_, cases) in FORMS.items() for fields in cases]


def test_every_kind_has_its_closed_form_here() -> None:
    assert FORMS.keys() | COMPARED.keys() == KINDS.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_names_its_paper(kind: str) -> None:
    module = inspect.getmodule(KINDS[kind])
    assert module is not None and "arXiv" in str(module.__doc__)


def items_of(algo: Algorithm, tokens: Sequence[Token]) -> LossItems:
    """As a job and the train engine would make them, in fp64."""
    names = ("behaviour", "proximal", "reference")
    columns = {n: torch.tensor([getattr(t, n) for t in tokens], dtype=torch.float64) for n in names}
    # what policies fill is there only where the algorithm asks for it
    streams = {name: columns[name] for name in ("behaviour", *algo.policies)}
    if isinstance(algo, PolicyAlgorithm):
        credit = np.concatenate([values for group in algo.credit(GROUPS) for values in group])
        streams["advantage"] = torch.from_numpy(credit).double()
    lengths = [n for group in LENGTHS for n in group]
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    weight = item_weights(sequence, getattr(algo, "loss_aggregation", "token"))
    assert set(algo.loss().streams) <= set(streams)
    return LossItems(
        weight=torch.from_numpy(weight).double(),
        sequence=torch.from_numpy(sequence),
        streams={name: streams[name] for name in {*algo.loss().streams, *algo.policies}},
    )


def some_tokens() -> list[Token]:
    draw = np.random.default_rng(0)
    return [
        Token(
            rewards=rewards,
            own=own,
            current=float(behaviour + draw.normal() * 0.3),
            behaviour=float(behaviour),
            proximal=float(behaviour + draw.normal() * 0.2),
            reference=float(behaviour + draw.normal() * 0.3),
        )
        for rewards, lengths in zip(REWARDS, LENGTHS, strict=True)
        for own, length in enumerate(lengths)
        for behaviour in draw.normal(-3.0, 1.0, length)
    ]


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
@pytest.mark.parametrize(("kind", "fields"), CASES, ids=str)
def test_the_loss_is_the_formula(kind: str, fields: Fields, aggregation: str) -> None:
    by_rollout = {"loss_aggregation": aggregation} if kind != "sft" else {}
    algo = algorithm({"kind": kind, **fields, **by_rollout})
    tokens = some_tokens()
    current = torch.tensor([t.current for t in tokens], dtype=torch.float64)
    spec = algo.loss()
    got = load_loss(spec)(current, items_of(algo, tokens), **spec.params)
    lengths = [n for group in LENGTHS for n in group]
    shares = [
        1 / (n * len(lengths)) if by_rollout.get("loss_aggregation") == "sequence" else 1 / 12
        for n in lengths
        for _ in range(n)
    ]
    form = FORMS[kind][0]
    losses = [form(token, fields) for token in tokens]
    if "rejection_sampling" in fields:
        assert 0 < sum(loss == 0.0 for loss in losses) < len(losses)
    expected = sum(share * loss for share, loss in zip(shares, losses, strict=True))
    # advantages and weights are float32
    assert got.total.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_policies_are_asked_for_only_where_the_loss_reads_them() -> None:
    def policies(**fields: Any) -> Mapping[str, str]:
        return algorithm(fields).policies

    two = {"batch_size": 4, "ppo_n_minibatches": 2}
    assert policies() == {} and policies(kind="sft") == {}
    assert policies(**two) == {"proximal": CURRENT}
    assert policies(**two, use_decoupled_loss=False) == {}
    recomputed = {"use_decoupled_loss": False, "recompute_logprob": True}
    assert policies(**two, **recomputed) == {"proximal": CURRENT}
    # RLOO's loss reads no proximal policy: no pass is spent on one
    assert policies(kind="rloo", **two) == {}
    assert policies(kind="rloo", kl_ctl=0.1) == policies(kl_ctl=0.1) == {"reference": "base"}
