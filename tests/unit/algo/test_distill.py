"""Advantages of a teacher, and what a run that has one may be asked for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from lorelei.algo.distill import Distill, discounted, loss
from lorelei.algo.frozen import RunVersion, frozen_adapters, parse_version
from lorelei.algo.grpo import Grpo
from lorelei.algo.loss import LossItems
from lorelei.config.errors import ConfigError
from lorelei.run_file import load_config, to_plain, validate
from lorelei.types import BASE, CURRENT, Items

RUN: dict[str, Any] = {
    "model": "m/m",
    "task": {"kind": "jsonl", "path": "/rows.jsonl"},
    "algo": {"kind": "distill", "teacher": "/teacher"},
}
SEQUENCE = [0, 0, 0, 1, 1, 2]


def made(**fields: Any) -> Distill:
    return Distill(**{"kind": "distill", "teacher": BASE, **fields})


def items(**streams: np.ndarray) -> Items:
    n, nothing = len(SEQUENCE), np.zeros(len(SEQUENCE), np.float32)
    numbers = np.arange(n)
    return Items(
        source=numbers,
        target=numbers,
        weight=nothing,
        temperature=nothing,
        sequence=np.array(SEQUENCE),
        streams={name: values.astype(np.float32) for name, values in streams.items()},
    )


@pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
def test_a_token_answers_for_the_divergence_from_it_on(discount: float) -> None:
    values = np.random.default_rng(0).normal(size=len(SEQUENCE))
    own = [[values[i] for i, s in enumerate(SEQUENCE) if s == n] for n in range(3)]
    expected = [
        sum(discount**k * value for k, value in enumerate(sequence[t:]))
        for sequence in own
        for t in range(len(sequence))
    ]
    got = discounted(values, np.array(SEQUENCE), discount)
    np.testing.assert_allclose(got, expected, rtol=1e-10)


def test_the_advantage_is_the_rewards_and_the_teachers() -> None:
    rng = np.random.default_rng(1)
    names = ("advantage", "behaviour", "proximal", "teacher")
    streams = {name: rng.normal(size=len(SEQUENCE)).astype(np.float32) for name in names}
    one = items(**streams)
    for student, recompute in (("behaviour", False), ("proximal", True)):
        algo = made(reward_weight=0.25, recompute_logprob=recompute)
        (got,) = algo.with_policies([one], np.array([0, 0, 1]))
        expected = 0.25 * streams["advantage"] - (streams[student] - streams["teacher"])
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert made(recompute_logprob=True).policies == {"proximal": CURRENT, "teacher": BASE}


def test_rounds_are_mixed_each_on_its_own() -> None:
    rng = np.random.default_rng(2)
    rounds = [
        items(**{n: rng.normal(size=6) for n in ("advantage", "behaviour", "teacher", "reference")})
        for _ in range(2)
    ]
    groups = np.arange(6)
    algo = made(discount=0.9, reward_weight=1.0)
    alone = [algo.with_policies([one], groups)[0] for one in rounds]
    for got, expected in zip(algo.with_policies(rounds, groups), alone, strict=True):
        np.testing.assert_array_equal(got, expected)
    # with the divergence from a reference in the rewards too, both are subtracted
    both = made(discount=0.9, reward_weight=1.0, kl_ctl=0.5, use_kl_in_reward=True, adv_norm=None)
    usual = Grpo(kl_ctl=0.5, use_kl_in_reward=True, adv_norm=None).with_kl(rounds, groups)
    for got, kl, one, first in zip(
        both.with_policies(rounds, groups), usual, rounds, alone, strict=True
    ):
        expected = first - one.streams["advantage"] + kl
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_loss_and_gradient_are_the_formula_on_doubles() -> None:
    rng = np.random.default_rng(3)
    names = ("current", "behaviour", "advantage", "teacher", "reference", "weight")
    c, b, a, t, r, w = (torch.from_numpy(rng.normal(size=6)) for _ in names)
    current = c.clone().requires_grad_()
    streams = {"behaviour": b, "advantage": a, "teacher": t, "reference": r}
    got = loss(
        current,
        LossItems(weight=w, sequence=torch.tensor(SEQUENCE), streams=streams),
        kl_ctl=0.5,
    )
    got.total.backward()
    rows = list(zip(*(x.tolist() for x in (c, b, a, t, r, w)), strict=True))
    expected = sum(
        wi * (-math.exp(ci - bi) * ai + 0.5 * (math.exp(ri - ci) - 1 - (ri - ci)))
        for ci, bi, ai, _, ri, wi in rows
    )
    slope = [
        wi * (-math.exp(ci - bi) * ai + 0.5 * (1 - math.exp(ri - ci)))
        for ci, bi, ai, _, ri, wi in rows
    ]
    gap = sum(wi * (bi - ti) for _, bi, _, ti, _, wi in rows)
    # kl_estimate leaves out the constant -1, which has no gradient
    assert got.total.item() == pytest.approx(expected, abs=1e-10)
    assert current.grad is not None
    np.testing.assert_allclose(current.grad.numpy(), slope, atol=1e-10)
    assert got.metrics["kl_teacher"].item() == pytest.approx(gap, abs=1e-10)


def test_a_step_on_policy_is_the_gradient_of_the_reverse_divergence() -> None:
    """Over all tokens of a vocabulary, each as often as the student samples it."""
    student = torch.tensor([0.3, -0.2, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([-0.5, 0.4, 0.2, 0.1], dtype=torch.float64).log_softmax(0)
    logprobs = student.log_softmax(0)
    exact = (logprobs.exp() * (logprobs - teacher)).sum()
    (expected,) = torch.autograd.grad(exact, student, retain_graph=True)
    sampled = logprobs.detach()
    streams = {"behaviour": sampled, "teacher": teacher, "advantage": teacher - sampled}
    held = LossItems(weight=sampled.exp(), sequence=torch.arange(4), streams=streams)
    found = loss(student.log_softmax(0), held)
    (got,) = torch.autograd.grad(found.total, student)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    assert found.metrics["kl_teacher"].item() == pytest.approx(exact.item(), abs=1e-10)


# --- what a run may say


def test_a_run_without_a_reward_is_not_evaluated_and_needs_no_group() -> None:
    config = validate({**RUN, "rollout": {"n_samples": 1}})
    (e,) = config.experiments()
    assert e.reward is None and e.eval.every == 0 and e.eval_size == 0 and e.samples
    again = validate(to_plain(config))
    assert again.experiments() == config.experiments()
    several = {**RUN, "adapters": {"a": {}, "b": {"reward": {"kind": "math_verify"}}}}
    config = validate(several)
    assert [e.eval.every for e in config.experiments()] == [0, 5]
    assert validate(to_plain(config)).experiments() == config.experiments()


def test_an_environment_is_no_reward_unless_it_is_said_to_be() -> None:
    env = {"kind": "python", "path": "/e.py:step"}
    (e,) = validate({**RUN, "env": env}).experiments()
    assert e.reward is None
    weighed = {**RUN, "algo": {**RUN["algo"], "reward_weight": 1.0}, "env": env}
    (e,) = validate(weighed).experiments()
    assert e.reward is not None and e.reward.kind == "env"


ALGO = "algo.%s does nothing with reward_weight: 0; raise it, or remove this"


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"algo": {"kind": "distill"}}, "algo.teacher: is required"),
        ({"algo": {"teacher": "current"}}, "algo.teacher: 'current' is not allowed; write base"),
        ({"algo": {"teacher": "/r:a@7"}}, "a version of a run's adapter is written RUN:ADAPTER@vN"),
        ({"algo": {"reward_weight": 1.0}}, "reward: is required for task.kind 'jsonl'"),
        ({"algo": {"discount": 1.5}}, "algo.discount: 1.5 is not allowed"),
        ({"algo": {"adv_norm": None}}, ALGO % "adv_norm: None"),
        ({"algo": {"reward_scaling": 2.0}}, ALGO % "reward_scaling: 2.0"),
        ({"algo": {"drop_zero_variance_groups": True}}, ALGO % "drop_zero_variance_groups: True"),
        (
            {"algo": {"kl_ctl": 0.1, "use_kl_in_reward": True}},
            ALGO % "use_kl_in_reward: True",
        ),
        (
            {"algo": {"reference": "/folder"}},
            "algo.reference: '/folder' does nothing with kl_ctl: 0; raise it, or remove this",
        ),
        (
            {
                "algo": {"reward_weight": 1.0},
                "reward": {"kind": "math_verify"},
                "rollout": {"n_samples": 1},
            },
            "rollout.n_samples: 1 gives algo.kind 'distill' no statistics of a group",
        ),
        ({"eval": {"every": 2}}, "eval: has no effect without a reward, by which held-out"),
        ({"env": {"kind": "multi_turn"}}, "env.kind: 'multi_turn' tells right answers from wrong"),
    ],
)
def test_what_has_no_effect_or_cannot_work_is_refused(
    sections: dict[str, Any], expected: str
) -> None:
    given = sections.get("algo", {})
    algo = given if given.get("kind") else {**RUN["algo"], **given}
    with pytest.raises((ConfigError, ValidationError)) as caught:
        validate({**RUN, **sections, "algo": algo}).experiments()
    assert expected in str(caught.value)


def test_frozen_adapters_are_named_from_the_file_s_folder(tmp_path: Any, monkeypatch: Any) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: m/m\ntask: {kind: jsonl, path: rows.jsonl}\n"
        "algo: {kind: distill, teacher: 'runs/x:default@v3'}\n"
        "adapters: {a: {}, b: {algo: {teacher: base}}, c: {algo: {teacher: ./base}}}\n"
    )
    a, b, c = load_config(path).experiments()
    assert frozen_adapters(a.algo) == {"teacher": f"{tmp_path}/runs/x:default@v3"}
    assert frozen_adapters(b.algo) == {}
    assert frozen_adapters(c.algo) == {"teacher": f"{tmp_path}/base"}
    here = load_config(path, ["algo.teacher=t"]).experiments()[0]
    assert frozen_adapters(here.algo) == {"teacher": f"{tmp_path}/elsewhere/t"}
    version = parse_version(f"{tmp_path}/runs/x:default@v3")
    assert version == RunVersion(run=tmp_path / "runs/x", adapter="default", version=3)
    assert parse_version("/a/folder") is None
    assert Grpo(kl_ctl=0.1, reference="/r").policies == {"reference": "/r"}
