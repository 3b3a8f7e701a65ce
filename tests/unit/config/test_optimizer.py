"""The learning rate over a run, and the optimizer's other numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from lorelei.config.errors import FieldError
from lorelei.config.optimizer import OptimizerConfig, from_algo
from lorelei.run_file import load_config

RUN = "model: m/m\ntask: {kind: reasoning_gym, name: chain_sum}\n"


def rates(steps: int, **fields: object) -> list[float]:
    optimizer = OptimizerConfig.model_validate({"lr": 1.0, **fields})
    return [optimizer.at(step, steps).lr for step in range(steps)]


def test_a_constant_rate_stays() -> None:
    assert rates(4) == [1.0] * 4


def test_a_warm_up_rises_to_the_peak_and_never_starts_at_zero() -> None:
    assert rates(6, warmup_steps=3) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_a_linear_rate_falls_by_equal_steps_after_the_warm_up() -> None:
    assert rates(4, lr_schedule="linear") == pytest.approx([1, 0.75, 0.5, 0.25])
    got = rates(6, lr_schedule="linear", warmup_steps=2)
    assert got == pytest.approx([1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25])


def test_a_cosine_rate_is_half_way_down_in_the_middle() -> None:
    got = rates(8, lr_schedule="cosine")
    assert got == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)])
    assert got[4] == pytest.approx(0.5) and got[-1] > 0


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 5, 9])
def test_every_rate_is_positive_and_at_most_the_peak(schedule: str, warmup: int) -> None:
    for steps in (1, 2, 7):
        got = rates(steps, lr_schedule=schedule, warmup_steps=warmup)
        assert all(0 < rate <= 1 for rate in got)


def test_the_other_numbers_are_those_of_the_configuration() -> None:
    optimizer = OptimizerConfig(
        lr=3e-4, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.1, gradient_clipping=0.0
    )
    hyper = optimizer.at(0, 10)
    assert (hyper.lr, hyper.beta1, hyper.beta2) == (3e-4, 0.8, 0.95)
    assert (hyper.eps, hyper.weight_decay, hyper.max_grad_norm) == (1e-6, 0.1, 0.0)


def test_a_rate_may_fall_to_a_share_of_the_peak() -> None:
    for schedule in ("linear", "cosine"):
        whole = rates(8, lr_schedule=schedule)
        got = rates(8, lr_schedule=schedule, min_lr_ratio=0.1)
        assert got == pytest.approx([0.1 + 0.9 * share for share in whole])
    with pytest.raises(ValidationError, match="does nothing with lr_schedule: constant"):
        OptimizerConfig(min_lr_ratio=0.1)


OTHER: dict[str, Any] = {
    "lr": 1e-3,
    "lr_schedule": "linear",
    "min_lr_ratio": 0.5,
    "warmup_steps": 3,
    "beta1": 0.8,
    "beta2": 0.9,
    "eps": 1e-6,
    "weight_decay": 0.1,
    "gradient_clipping": 2.0,
}


BESIDE: dict[str, dict[str, Any]] = {"min_lr_ratio": {"lr_schedule": "cosine"}}


@pytest.mark.parametrize("field", OptimizerConfig.model_fields)
def test_every_field_has_an_effect(field: str) -> None:
    beside = BESIDE.get(field, {})
    usual, other = (
        OptimizerConfig.model_validate(fields)
        for fields in (beside, {**beside, field: OTHER[field]})
    )
    assert [usual.at(step, 9) for step in range(9)] != [other.at(step, 9) for step in range(9)]


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(RUN + text)
    return path


@pytest.mark.parametrize("field", OptimizerConfig.model_fields)
def test_the_keys_of_older_files_go_on_to_work(tmp_path: Path, field: str) -> None:
    given = yaml.safe_dump({**BESIDE.get(field, {}), field: OTHER[field]}, default_flow_style=True)
    new = load_config(write(tmp_path, f"optimizer: {given}"))
    old = load_config(write(tmp_path, f"algo: {{kind: rloo, {given.strip()[1:]}"))
    assert getattr(old.optimizer, field) == OTHER[field]
    assert old.optimizer == new.optimizer and old.algo.kind == "rloo"


def test_keys_of_older_files_may_stand_in_an_adapter(tmp_path: Path) -> None:
    text = "algo: {lr: 1.0e-3, beta1: 0.8}\nadapters: {a: {algo: {lr: 1.0e-4}}, b: {}}"
    a, b = load_config(write(tmp_path, text)).experiments()
    assert (a.optimizer.lr, a.optimizer.beta1) == (1e-4, 0.8)
    assert (b.optimizer.lr, b.optimizer.beta1) == (1e-3, 0.8)


@pytest.mark.parametrize("key", ["algo", "optimizer"])
@pytest.mark.parametrize("section", ["algo", "optimizer"])
def test_an_override_wins_whichever_of_both_names_the_file_uses(
    tmp_path: Path, key: str, section: str
) -> None:
    path = write(
        tmp_path, f"{section}: {{lr: 1.0e-3}}\nadapters: {{a: {{{section}: {{eps: 1.0}}}}}}"
    )
    more = [f"{key}.lr=1e-4", f"adapters.a.{key}.eps=0.5"]
    (experiment,) = load_config(path, more).experiments()
    assert (experiment.optimizer.lr, experiment.optimizer.eps) == (1e-4, 0.5)


def test_of_overrides_with_both_names_the_last_counts(tmp_path: Path) -> None:
    path = write(tmp_path, "")
    assert load_config(path, ["algo.lr=0.1", "optimizer.lr=0.2"]).optimizer.lr == 0.2
    assert load_config(path, ["optimizer.lr=0.2", "algo={lr: 0.1}"]).optimizer.lr == 0.1


def test_what_both_sections_of_a_file_give_is_refused() -> None:
    with pytest.raises(FieldError, match=r"^algo\.lr: is optimizer\.lr too; give one of them$"):
        from_algo({"algo": {"lr": 1.0}, "optimizer": {"lr": 1.0}})
