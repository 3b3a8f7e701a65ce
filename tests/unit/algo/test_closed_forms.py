"""What every algorithm computes from rollouts, against its paper's formula in plain floats.

A new kind needs an entry in FORMS; the formulas share no code with `lorelei.algo`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import pytest
import torch

from lorelei.algo.algorithm import Algorithm, PolicyAlgorithm
from lorelei.algo.kinds import KINDS, algorithm
from lorelei.algo.loss import LossItems, item_weights, load_loss
from lorelei.types import CURRENT, Items
from tests.episodes import rollout, turn
from tests.unit.algo.test_preference_forms import COMPARED

REWARDS = [[1.0, 0.0, 0.25], [2.0, -1.0]]  # by group
LENGTHS = [[3, 1, 2], [2, 4]]  # tokens of the rollouts
TOKENS = 12
BASELINE = 0.5  # the reward of every greedy answer
GROUPS = [
    [
        replace(rollout(turn([1, 2], list(range(n))), reward=r), baseline=BASELINE)
        for r, n in zip(rs, ns, strict=True)
    ]
    for rs, ns in zip(REWARDS, LENGTHS, strict=True)
]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Token:
    """What a formula may read of a token; logarithms of probabilities."""

    rewards: Sequence[float]  # of its group
    own: int  # which of them is its rollout's
    current: float
    behaviour: float
    proximal: float
    reference: float
    teacher: float
    batch: list[Token] = field(repr=False)  # all there are
    answer: list[Token] = field(repr=False)  # those of its rollout

    @property
    def reward(self) -> float:
        return self.rewards[self.own]


Fields = Mapping[str, Any]
Credit = Callable[[Token, Fields], float]
Form = Callable[[Token, Credit, Fields], float]


def z_score(token: Token, fields: Fields) -> float:
    """Shao et al. (arXiv 2402.03300), section 4.1.2."""
    return (token.reward - fmean(token.rewards)) / (pstdev(token.rewards) + 1e-6)


def centred(token: Token, fields: Fields) -> float:
    """Liu et al. (arXiv 2503.20783), section 3.2."""
    return token.reward - fmean(token.rewards)


def others(token: Token, fields: Fields) -> float:
    """Ahmadian et al. (arXiv 2402.14740), eq. 7."""
    return token.reward - fmean(r for n, r in enumerate(token.rewards) if n != token.own)


def above_greedy(token: Token, fields: Fields) -> float:
    """Li et al. (arXiv 2310.10505), eq. 4."""
    return token.reward - BASELINE


def of_the_batch(token: Token, fields: Fields) -> float:
    """Hu et al. (arXiv 2501.03262): the z-score among all tokens."""
    by_group = fields.get("baseline_of") == "group"

    def value(one: Token) -> float:
        return one.reward - (fmean(one.rewards) if by_group else 0.0)

    values = [value(one) for one in token.batch]
    return (value(token) - fmean(values)) / (pstdev(values) + 1e-6)


def least_stale(token: Token, fields: Fields) -> float:
    """Zheng et al. (arXiv 2510.01161): the advantage, but 0 where the second moment is too high."""

    def moment(one: Token) -> float:
        return (one.proximal - one.behaviour) ** 2

    kept = sorted(token.batch, key=moment)
    while fmean(map(moment, kept)) >= fields.get("m2_threshold", 0.04):
        kept.pop()
    return z_score(token, fields) * (token in kept)


def from_teacher(token: Token, fields: Fields) -> float:
    """Agarwal et al. (arXiv 2306.13649) with the reverse divergence, at the sampled token."""
    student = token.proximal if fields.get("recompute_logprob") else token.behaviour
    weight = fields.get("reward_weight", 0.0)
    return weight * z_score(token, fields) - (student - token.teacher)


def kl(token: Token, fields: Fields) -> float:
    """Schulman, 2020."""
    log_ratio = token.reference - token.current
    estimates = {
        "k1": -log_ratio,
        "k2": log_ratio**2 / 2,
        "k3": math.exp(log_ratio) - 1 - log_ratio,
    }
    return fields.get("kl_ctl", 0.0) * estimates[fields.get("kl_estimator", "k3")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """Hilton et al. (arXiv 2110.00641): to what, and with what weight beside it."""

    log: float
    weight: float
    kept: bool


def ratio_of(token: Token, fields: Fields, *, decoupled: bool = True) -> Ratio:
    decoupled = fields.get("use_decoupled_loss", decoupled)
    recomputed = decoupled or fields.get("recompute_logprob", False)

    def proximal(one: Token) -> float:
        # with one optimizer step a batch nothing has moved since its start
        moved = recomputed and fields.get("ppo_n_minibatches", 1) > 1
        moved = moved or "m2_threshold" in fields
        return one.proximal if moved else one.current

    bounds = fields.get("rejection_sampling", {})
    logs = [proximal(one) - one.behaviour for one in token.answer]
    own = proximal(token) - token.behaviour
    agg = {"mean": fmean, "sum": math.fsum, "max": max}[bounds.get("agg", "mean")]
    metric, whole = bounds.get("metric", "ratio"), bounds.get("level") == "sequence"
    weight = math.exp(own)
    if whole and metric == "ratio":
        weight = math.exp(math.fsum(logs) if bounds.get("agg") == "sum" else fmean(logs))
    if metric == "ratio":
        judged = math.exp(agg(logs) if whole else own)
    else:
        kls = {
            "kl_k1": lambda x: x,
            "kl_k2": lambda x: x * x / 2,
            "kl_k3": lambda x: math.exp(-x) - 1 + x,
        }[metric]
        judged = agg(map(kls, logs)) if whole else kls(own)
    low, high = bounds.get("lower", -math.inf), bounds.get("upper", math.inf)
    kept = low <= judged <= high
    if bounds.get("action") == "clamp":
        weight, kept = min(max(weight, low), high), True
    anchor = proximal(token) if recomputed else token.behaviour
    weight = (weight if decoupled else 1.0) * kept
    return Ratio(log=token.current - anchor, weight=weight, kept=kept)


def surrogate(ratio: float, advantage: float, fields: Fields, low: float, high: float) -> float:
    """Schulman et al. (arXiv 1707.06347), eq. 7; dual: Ye et al. (arXiv 1912.09729), eq. 3."""
    low = fields.get("eps_clip", low)
    high = fields.get("eps_clip_higher", fields.get("eps_clip", high))
    clipped = min(max(ratio, 1 - low), 1 + high)
    least = min(ratio * advantage, clipped * advantage)
    if "c_clip" in fields and advantage < 0:
        least = max(least, fields["c_clip"] * advantage)
    return -least


def clip(token: Token, credit: Credit, fields: Fields) -> float:
    found = ratio_of(token, fields)
    loss = surrogate(math.exp(found.log), credit(token, fields), fields, 0.2, 0.2)
    return loss * found.weight + kl(token, fields) * found.kept


def dapo(token: Token, credit: Credit, fields: Fields) -> float:
    """Yu et al. (arXiv 2503.14476), eq. 10."""
    return clip(token, credit, {"eps_clip_higher": 0.28, **fields})


def gspo(token: Token, credit: Credit, fields: Fields) -> float:
    """Zheng et al. (arXiv 2507.18071), eqs. 5 and 7."""
    mine = ratio_of(token, fields)
    logs = [found.log for t in token.answer if (found := ratio_of(t, fields)).kept]
    ratio = math.exp(fmean(logs)) if logs else 1.0
    fields = {"eps_clip": 3e-4, "eps_clip_higher": 4e-4, **fields}
    loss = surrogate(ratio, credit(token, fields), fields, 0, 0)
    return loss * mine.weight + kl(token, fields) * mine.kept


def cispo(token: Token, credit: Credit, fields: Fields) -> float:
    """MiniMax (arXiv 2506.13585), eqs. 4 and 5."""
    found = ratio_of(token, fields, decoupled=False)
    low, high = 1 - fields.get("eps_clip", 1.0), 1 + fields.get("eps_clip_higher", 4.0)
    weight = min(max(math.exp(found.log), low), high)
    loss = -weight * credit(token, fields) * token.current
    return loss * found.weight + kl(token, fields) * found.kept


def sapo(token: Token, credit: Credit, fields: Fields) -> float:
    """Gao et al. (arXiv 2511.20347), eqs. 5 and 6."""
    found = ratio_of(token, fields, decoupled=False)
    advantage = credit(token, fields)
    tau = fields.get("tau_pos", 1.0) if advantage > 0 else fields.get("tau_neg", 1.05)
    gate = 4 / tau / (1 + math.exp(-tau * (math.exp(found.log) - 1)))
    return -gate * advantage * found.weight + kl(token, fields) * found.kept


def m2po(token: Token, credit: Credit, fields: Fields) -> float:
    """Zheng et al. (arXiv 2510.01161), eq. 8."""
    fields = {"m2_threshold": 0.04, **fields}
    found = ratio_of(token, fields, decoupled=False)
    loss = -math.exp(found.log) * credit(token, fields)
    return loss * found.weight + kl(token, fields) * found.kept


def rloo(token: Token, credit: Credit, fields: Fields) -> float:
    """Ahmadian et al. (arXiv 2402.14740), with the ratio to what was sampled from."""
    ratio = math.exp(token.current - token.behaviour)
    return -ratio * credit(token, fields) + kl(token, fields)


def sft(token: Token, credit: Credit, fields: Fields) -> float:
    """Ouyang et al. (arXiv 2203.02155), section 3.5: negative log-likelihood."""
    return -token.current


TWO = {"ppo_n_minibatches": 2}
BOUNDS: Mapping[str, Any] = {"upper": 1.1, "lower": 0.8}
PLAIN = {"use_decoupled_loss": False}
RECOMPUTED = {**PLAIN, "recompute_logprob": True, **TWO}


def bounded(**fields: Any) -> Fields:
    return {**TWO, "rejection_sampling": fields}


FORMS: Mapping[str, tuple[Form, Credit, Sequence[Fields]]] = {
    "cispo": (
        cispo,
        z_score,
        [
            {},
            {"eps_clip": 0.2, "eps_clip_higher": 0.2},
            {**TWO, "use_decoupled_loss": True, "kl_ctl": 0.5},
            {**bounded(**BOUNDS), "kl_ctl": 0.5},
        ],
    ),
    "dapo": (dapo, z_score, [{}, TWO]),
    "distill": (
        rloo,
        from_teacher,
        [
            {"teacher": "base"},
            {"teacher": "base", "reward_weight": 0.5, "kl_ctl": 0.5},
            {"teacher": "folder", "recompute_logprob": True},
        ],
    ),
    "dr_grpo": (clip, centred, [{}, TWO]),
    "grpo": (
        clip,
        z_score,
        [
            {},
            TWO,
            {**TWO, "eps_clip": 0.1, "eps_clip_higher": 0.3, "kl_ctl": 0.5},
            {**TWO, "eps_clip": 0.05, "c_clip": 1.1},
            {**TWO, "kl_ctl": 0.5, "kl_estimator": "k1"},
            {**TWO, "kl_ctl": 0.5, "kl_estimator": "k2"},
            bounded(**BOUNDS),
            bounded(**BOUNDS, action="clamp"),
            bounded(**BOUNDS, level="sequence"),
            bounded(**BOUNDS, level="sequence", agg="sum"),
            bounded(**BOUNDS, level="sequence", agg="max"),
            bounded(**BOUNDS, level="sequence", agg="sum", action="clamp"),
            bounded(metric="kl_k1", upper=0.1),
            bounded(metric="kl_k2", upper=0.02),
            bounded(metric="kl_k3", upper=0.02),
            bounded(metric="kl_k3", upper=0.02, level="sequence"),
            PLAIN,
            RECOMPUTED,
        ],
    ),
    "gspo": (gspo, z_score, [{}, TWO, {**TWO, "eps_clip": 0.1, "eps_clip_higher": 0.1}, PLAIN]),
    "gspo_token": (
        gspo,
        z_score,
        [{}, TWO, {**TWO, "eps_clip": 0.1, "eps_clip_higher": 0.1}, bounded(**BOUNDS)],
    ),
    "m2po": (
        m2po,
        least_stale,
        [{}, {"m2_threshold": 0.01, "kl_ctl": 0.5}, {"use_decoupled_loss": True}],
    ),
    "reinforce_pp": (clip, of_the_batch, [{}, {**TWO, "baseline_of": "group"}]),
    "remax": (rloo, above_greedy, [{}, {"kl_ctl": 0.5}]),
    "rloo": (rloo, others, [{}, {"kl_ctl": 0.5}, {"kl_ctl": 0.5, "kl_estimator": "k2"}]),
    "sapo": (sapo, z_score, [{}, {"tau_pos": 2.0, "tau_neg": 3.0, "kl_ctl": 0.5}, RECOMPUTED]),
    "sft": (sft, others, [{}]),
}
CASES = [(kind, fields) for kind, (_, _, cases) in FORMS.items() for fields in cases]


def test_every_kind_has_its_closed_form_here() -> None:
    assert FORMS.keys() | COMPARED.keys() == KINDS.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_names_its_paper(kind: str) -> None:
    module = inspect.getmodule(KINDS[kind])
    assert module is not None and "arXiv" in str(module.__doc__)


def some_tokens() -> list[Token]:
    draw, taught = np.random.default_rng(0), np.random.default_rng(1)
    batch: list[Token] = []
    for rewards, lengths in zip(REWARDS, LENGTHS, strict=True):
        for own, length in enumerate(lengths):
            answer: list[Token] = []
            for behaviour in draw.normal(-3.0, 1.0, length):
                token = Token(
                    rewards=rewards,
                    own=own,
                    current=float(behaviour + draw.normal() * 0.3),
                    behaviour=float(behaviour),
                    proximal=float(behaviour + draw.normal() * 0.2),
                    reference=float(behaviour + draw.normal() * 0.3),
                    teacher=float(behaviour + taught.normal() * 0.3),
                    batch=batch,
                    answer=answer,
                )
                answer.append(token)
                batch.append(token)
    return batch


TOKENS_OF_ALL = some_tokens()
SEQUENCE = np.repeat(np.arange(5), [n for group in LENGTHS for n in group])


def column(name: str) -> np.ndarray:
    return np.array([getattr(token, name) for token in TOKENS_OF_ALL])


def policies_of(algo: Algorithm) -> dict[str, np.ndarray]:
    """What is there beside the advantage: of policies only what the algorithm asks for."""
    return {name: column(name) for name in ("behaviour", *algo.policies)}


def shares(aggregation: str) -> list[float]:
    """The weights of tokens, in fp64."""
    lengths = [n for group in LENGTHS for n in group for _ in range(n)]
    if aggregation == "sequence":
        return [1 / (n * 5) for n in lengths]
    return [1 / (5 * 8) if aggregation == "constant" else 1 / TOKENS] * TOKENS


@pytest.mark.parametrize(("kind", "fields"), CASES, ids=str)
def test_the_credit_is_the_formula(kind: str, fields: Fields) -> None:
    algo = algorithm({"kind": kind, **fields})
    if not isinstance(algo, PolicyAlgorithm):
        return
    credit = np.concatenate([values for group in algo.credit(GROUPS) for values in group])
    if algo.credit_reads_policies:
        nothing = np.zeros(TOKENS, dtype=np.int64)
        items = Items(
            source=nothing,
            target=nothing,
            weight=nothing.astype(np.float32),
            temperature=nothing.astype(np.float32),
            sequence=SEQUENCE,
            streams={**policies_of(algo), "advantage": credit},
        )
        (credit,) = algo.with_policies([items], np.repeat([0, 1], [3, 2]))
    expected = [FORMS[kind][1](token, fields) for token in TOKENS_OF_ALL]
    np.testing.assert_allclose(credit, expected, rtol=1e-5, atol=1e-6)  # it is float32


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize(("kind", "fields"), CASES, ids=str)
def test_the_loss_is_the_formula(kind: str, fields: Fields, aggregation: str) -> None:
    if kind == "sft" and aggregation != "token":
        return
    weighing = {"loss_aggregation": aggregation} if kind != "sft" else {}
    algo = algorithm({"kind": kind, **fields, **weighing})
    form, credit, _ = FORMS[kind]
    streams = policies_of(algo)
    streams["advantage"] = np.array([credit(token, fields) for token in TOKENS_OF_ALL])
    spec, weight = algo.loss(), torch.tensor(shares(aggregation), dtype=torch.float64)
    assert set(spec.streams) <= set(streams)
    items = LossItems(
        weight=weight,
        sequence=torch.from_numpy(SEQUENCE),
        streams={name: torch.from_numpy(streams[name]) for name in {*spec.streams, *algo.policies}},
    )
    current = torch.from_numpy(column("current"))
    got = load_loss(spec)(current, items, **spec.params)
    losses = [form(token, credit, fields) for token in TOKENS_OF_ALL]
    if fields.get("rejection_sampling", {}).get("action", "clamp") == "mask":
        assert 0 < sum(loss == 0.0 for loss in losses) < len(losses)
    expected = sum(s * loss for s, loss in zip(weight.tolist(), losses, strict=True))
    assert got.total.item() == pytest.approx(expected, rel=1e-10, abs=1e-10)
    found = item_weights(SEQUENCE, getattr(algo, "loss_aggregation", "token"), length=8)
    np.testing.assert_allclose(found, weight, rtol=1e-6)


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
    # M2PO finds what is too stale before the first update
    assert policies(kind="m2po") == {"proximal": CURRENT}
    assert policies(kind="cispo") == policies(kind="sapo", **two) == {}
