"""Runs that learn from a teacher: a frozen adapter in the train engine."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from lorelei.cli.trained_run import TrainedRun
from lorelei.launch import local
from lorelei.lora.origin import ORIGIN, origin_bytes, read_origin
from lorelei.plan.plan import plan
from lorelei.run_file import load_config
from lorelei.store.check import check_run
from lorelei.store.identity import read_identity
from lorelei.store.inputs import Inputs
from tests.tiny_runs import final, lorelei, make_workplace, records, write_run

TEACH = {"kind": "sft", "lr": 1.0e-2, "batch_size": 8}
TWICE = """
def step(turns_left):
    return "Once more." if turns_left else None
"""
STUDENT = {"kind": "distill", "teacher": "teacher", "lr": 1.0e-2, "batch_size": 4}


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A workplace with runs/teach, which learnt to say one word, and its export, teacher/."""
    folder = make_workplace(tmp_path_factory.mktemp("place"), tiny_tokenizer)
    rows = [{"question": f"Say the number {n}.", "answer": "tea tea tea"} for n in range(64)]
    (folder / "taught.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"path": "taught.jsonl"}
    run(folder, "teach", algo=TEACH, task=task, eval={"every": 0}, reward=None, rollout=None)
    lorelei(folder, "export", "runs/teach", "--out", "teacher")
    return folder


def run(place: Path, name: str, **sections: Any) -> Path:
    path = write_run(place, name, runs_dir=str(place / "runs"), **sections)
    local.train(load_config(path))
    return place / "runs" / name


def distil(place: Path, name: str, **sections: Any) -> Path:
    """Without a reward, and so without an evaluation, unless `sections` have them."""
    sections["algo"] = {**STUDENT, **sections.get("algo", {})}
    return run(place, name, **{"reward": None, "eval": None, **sections})


def gaps(folder: Path, adapter: str = "default") -> list[float]:
    return [r["kl_teacher"] for r in records(folder, "step") if r["adapter"] == adapter]


def inputs_of(folder: Path) -> Inputs:
    inputs = read_identity(folder).inputs
    assert inputs is not None
    return inputs


@pytest.fixture
def own_teacher(place: Path) -> Iterator[Path]:
    """A copy of the teacher, which a test may change."""
    yield Path(shutil.copytree(place / "teacher", place / "changing"))
    shutil.rmtree(place / "changing")


def test_a_student_closes_the_gap_to_its_teacher_without_a_reward(place: Path) -> None:
    folder = distil(place, "alone", steps=16, algo={"batch_size": 8})
    found = gaps(folder)
    # single steps see 256 tokens and scatter
    assert found[0] > 0.5 and sum(found[-4:]) < 0.4 * sum(found[:4])
    first = records(folder, "step")[0]
    assert not {"reward", "reward_std", "flat_groups", "reward_sampled"} & set(first)
    assert first["failed_rollouts"] == 0
    assert records(folder, "eval") == [] and check_run(folder) == []
    assert inputs_of(folder)["algo.teacher"].keys() >= {"adapter_model.safetensors"}


def test_a_version_of_a_run_teaches_like_its_export(place: Path) -> None:
    one = {"steps": 2, "rollout": {"n_samples": 1}}
    by_folder = distil(place, "by-folder", **one)
    version = distil(place, "by-version", algo={"teacher": "runs/teach:default@v1"}, **one)
    assert final(by_folder) == final(version) and gaps(version)[0] > 0.5
    assert inputs_of(version)["algo.teacher"].keys() == {"tensors"}
    with pytest.raises(ValueError, match=r"algo\.teacher: .*no checkpoint has default@v7; write"):
        distil(place, "absent", algo={"teacher": "runs/teach:default@v7"})
    assert not (place / "runs/absent").exists()


def test_the_base_teaches_an_adapter_that_has_moved_away_from_it(place: Path) -> None:
    back = {"algo": {"teacher": "base", "lr": 3.0e-3, "batch_size": 8}, "steps": 12}
    found = gaps(distil(place, "back", lora={"init_from": "teacher"}, **back))
    assert found[0] > 0.1 and sum(found[-3:]) < 0.7 * sum(found[:3])


def test_a_run_goes_on_to_the_same_bits(place: Path) -> None:
    whole = distil(place, "whole", steps=4, algo={"discount": 0.5})
    parts = distil(place, "parts", steps=2, algo={"discount": 0.5})
    local.resume(parts, ["steps=4"])
    assert final(parts) == final(whole) and check_run(parts) == []


def test_turns_have_the_teachers_word_for_every_token(place: Path) -> None:
    (place / "twice.py").write_text(TWICE)
    env = {"kind": "python", "path": "twice.py:step", "max_turns": 2}
    folder = distil(place, "turns", steps=2, env=env, algo={"discount": 1.0})
    first, _ = records(folder, "step")
    assert first["failed_rollouts"] == 0 and first["turns_mean"] == 2
    assert first["kl_teacher"] > 0.1 and "reward" not in first


def test_a_reward_is_mixed_in_or_only_measured(place: Path) -> None:
    reward = {"kind": "python", "path": "rewards.py:vowels", "workers": 1}
    scored = {"steps": 2, "reward": reward, "eval": {"every": 1, "n_prompts": 4}}
    alone = distil(place, "unscored", steps=2)
    measured = distil(place, "measured", **scored)
    mixed = distil(place, "mixed", algo={"reward_weight": 1.0}, **scored)
    tensors = [TrainedRun.read(f).state("default").tensors for f in (alone, measured, mixed)]
    # the problems that are held out are others
    assert gaps(measured)[0] == pytest.approx(gaps(mixed)[0])
    assert any(not torch.equal(tensors[1][name], tensors[2][name]) for name in tensors[1])
    assert {"reward", "kl_teacher"} <= set(records(mixed, "step")[0])
    assert len(records(mixed, "eval")) == len(records(measured, "eval")) == 3


def test_a_student_and_a_policy_learn_beside_each_other(place: Path) -> None:
    reward = {"kind": "python", "path": "rewards.py:vowels", "workers": 1}
    student = {"algo": STUDENT, "rollout": {"n_samples": 1}}
    policy = {"algo": {"kind": "grpo", "lr": 1.0e-2}, "reward": reward}
    near = {"kind": "grpo", "kl_ctl": 0.1, "reference": "teacher", "lr": 1.0e-2}
    held = {"algo": near, "reward": reward}
    adapters = {"student": student, "policy": policy, "held": held}
    both = {"reward": None, "eval": {"every": 0}, "algo": {"batch_size": 2}, "steps": 2}
    folder = run(place, "beside", adapters=adapters, **both)
    assert check_run(folder) == []
    by_name = {r["adapter"]: r for r in records(folder, "step")}
    assert "reward" not in by_name["student"] and "reward" in by_name["policy"]
    assert "kl_reference" in by_name["held"] and by_name["held"]["kl_reference"] > 0
    inputs = inputs_of(folder)
    assert inputs["adapters.student.algo.teacher"] == inputs["adapters.held.algo.reference"]
    local.resume(folder, ["adapters.student.steps=3"])
    assert len(gaps(folder, "student")) == 3


def test_preferences_are_compared_with_an_adapter(place: Path) -> None:
    pairs = [{"prompt": f"Say {n}.", "chosen": "tea tea", "rejected": "no"} for n in range(32)]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    algo = {"kind": "dpo", "reference": "teacher", "batch_size": 4, "lr": 1.0e-2}
    task, sections = {"path": "pairs.jsonl"}, {"reward": None, "rollout": None}
    evaluation = {"every": 1, "n_prompts": 8}
    folder = run(place, "dpo", algo=algo, task=task, steps=1, eval=evaluation, **sections)
    # the reference likes what is chosen better than the fresh adapter does
    first, last = (r["scores"] for r in records(folder, "eval"))
    assert first["accuracy"] < 0.5
    scored = json.loads(lorelei(place, "eval", "runs/dpo", "--json"))["default"]["v1"]
    assert scored["loss"] == pytest.approx(last["loss"], rel=1e-3)


def test_a_teacher_that_changed_or_went_is_named(place: Path, own_teacher: Path) -> None:
    folder = distil(place, "changed", steps=2, algo={"teacher": "changing"})
    tensors = load_file(own_teacher / "adapter_model.safetensors")
    tensors[min(tensors)] += 1e-3
    save_file(tensors, own_teacher / "adapter_model.safetensors", metadata={"format": "pt"})
    (problem,) = check_run(folder)
    assert problem.startswith("algo.teacher: is not what the run was made with")
    with pytest.raises(ValueError, match=r"algo\.teacher: is not .*--accept-changed algo\.teacher"):
        local.resume(folder, ["steps=3"])
    local.resume(folder, ["steps=3"], ["algo.teacher"])
    shutil.rmtree(own_teacher)
    with pytest.raises(ValueError, match=r"algo\.teacher: .*adapter_config.json"):
        local.resume(folder, ["steps=4"])
    own_teacher.mkdir()


def test_a_teacher_of_another_base_is_refused(place: Path, own_teacher: Path) -> None:
    base = {**read_origin(own_teacher).base, "weights": "0" * 64}
    (own_teacher / ORIGIN).write_bytes(origin_bytes(base))
    with pytest.raises(ValueError, match=r"algo\.teacher: the adapter in .* another base model"):
        distil(place, "foreign", algo={"teacher": "changing"})
    assert not (place / "runs/foreign").exists()


def test_the_page_s_runs_train(place: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "distillation.md").read_text()
    whole, near = map(yaml.safe_load, re.findall(r"```yaml\n(.*?)```", page, re.DOTALL))
    path = place / "page.yaml"
    path.write_text(yaml.safe_dump({**whole, "runs_dir": str(place / "runs"), "threads": 1}))
    here = [f"model={place / 'model'}", "steps=1", "algo.batch_size=2", "rollout.max_new_tokens=4"]
    local.train(load_config(path, here))
    assert len(gaps(place / "runs/page")) == 1
    lorelei(place, "report", "runs/page")
    run(place, "near", steps=1, algo={**near["algo"], "reference": "teacher"})
    assert records(place / "runs/near", "step")[0]["kl_reference"] > 0


def test_the_plan_counts_a_teacher_once(place: Path) -> None:
    adapters = {"one": {}, "two": {"algo": {"teacher": "runs/teach:default@v1"}}}
    path = write_run(place, "planned", reward=None, eval=None, algo=STUDENT, adapters=adapters)
    tensors = load_file(place / "teacher/adapter_model.safetensors")
    size = sum(tensor.numel() for tensor in tensors.values())
    held = plan(load_config(path)).memory["training"]["frozen adapters"]
    assert held == 2 * 4 * size  # the folder and the version
    held = plan(load_config(path, ["adapters.two.algo.teacher=" + str(place / "teacher")]))
    assert held.memory["training"]["frozen adapters"] == 4 * size
