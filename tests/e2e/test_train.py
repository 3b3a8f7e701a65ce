"""Whole runs on a tiny random model: the commands as users type them, and what trains in them."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lorelei.cli.trained_run import TrainedRun
from lorelei.launch import local
from lorelei.lora.peft_folder import read_peft_folder
from lorelei.lora.state import AdapterSnapshot
from lorelei.model.load import load_decoder
from lorelei.run_file import load_config
from lorelei.store.check import check_run
from lorelei.store.manifest import Manifest
from lorelei.train.archon.engine import archon_engine
from tests.contract.reference_rollout import reference_logprobs
from tests.episodes import random_group, weighted_batch
from tests.tiny_models import make_tiny
from tests.tiny_runs import lorelei, make_workplace, records, start, write_run

CHAIN_SUM = {
    "kind": "reasoning_gym",
    "name": "chain_sum",
    "config": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
}
LONG = {"steps": 25, "eval": {"every": 20}}  # about two seconds


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    return make_workplace(tmp_path_factory.mktemp("place"), tiny_tokenizer)


def train(place: Path, name: str, **sections: Any) -> Path:
    """Train in this process. Returns the run folder, which is sound."""
    config = load_config(write_run(place, name, runs_dir=str(place / "runs"), **sections))
    local.train(config)
    folder = place / "runs" / name
    assert check_run(folder) == []
    return folder


def last(folder: Path) -> Manifest:
    return TrainedRun.read(folder).manifest


def adapters(folder: Path) -> dict[str, str]:
    """{adapter: digest of its tensors}."""
    run = TrainedRun.read(folder)
    return {name: run.state(name).digest() for name in run.manifest.adapters}


# --- the commands


@pytest.fixture(scope="module")
def commands(place: Path) -> dict[str, tuple[int, str, str]]:
    """One run of 3 steps, then every command that looks at it, all at once."""
    write_run(place, "first", task=CHAIN_SUM, reward={"kind": "reasoning_gym"})
    lines = {
        "resume": ("resume", "first"),
        "eval": ("eval", "first", "--json", "--base"),
        "export": ("export", "runs/first", "--out", "exported"),
        "runs": ("runs", "--json"),
        "check": ("check", "first"),
        "samples": ("samples", "first", "-n", "2", "--step", "3"),
        "report": ("report", "first"),
    }
    done = {"train": ended(start(place, "train", "first.yaml"))}
    assert done["train"][0] == 0, done["train"]
    started = {name: start(place, *line) for name, line in lines.items()}
    return done | {name: ended(process) for name, process in started.items()}


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """(exit code, output, errors), without a line that tells of a busy machine."""
    out, errors = process.communicate(timeout=120)
    slow = ("reward: a worker has been starting for ", "reward: its first score takes longer ")
    kept = [line for line in errors.splitlines(keepends=True) if not line.startswith(slow)]
    return process.returncode, out, "".join(kept)


def test_every_command_ends_well_and_silently(commands: Mapping[str, tuple[int, str, str]]) -> None:
    assert {name: (code, errors) for name, (code, _, errors) in commands.items()} == {
        name: (0, "") for name in commands
    }


def test_train_prints_a_line_a_step_and_what_to_do_next(
    commands: Mapping[str, tuple[int, str, str]],
) -> None:
    out = commands["train"][1]
    assert [f"step {n}/3" in out for n in (1, 2, 3)] == [True] * 3
    assert "done: runs/first" in out and "lorelei export runs/first" in out


def test_resume_of_a_finished_run_says_so(commands: Mapping[str, tuple[int, str, str]]) -> None:
    assert commands["resume"][1].startswith("finished already, after step 3\n")


def test_check_and_runs_and_samples_tell_of_the_run(
    place: Path, commands: Mapping[str, tuple[int, str, str]]
) -> None:
    assert commands["check"][1] == "no problems\n"
    (listed,) = json.loads(commands["runs"][1])
    assert (listed["name"], listed["steps"], listed["status"]) == ("first", 3, "finished")
    assert commands["samples"][1].count("step 3 ") == 2
    assert "chain_sum/" in commands["samples"][1]


def test_eval_scores_the_adapter_and_the_base_as_training_did(
    place: Path, commands: Mapping[str, tuple[int, str, str]]
) -> None:
    scores = json.loads(commands["eval"][1])
    assert list(scores) == ["default"] and list(scores["default"]) == ["base", "v3"]
    assert {"strict", "lenient"} <= scores["default"]["v3"].keys()
    logged = [r["scores"] for r in records(place / "runs/first", "eval")]
    assert [scores["default"][v] for v in ("base", "v3")] == [logged[0], logged[-1]]


def test_report_draws_a_png(place: Path, commands: Mapping[str, tuple[int, str, str]]) -> None:
    path = place / commands["report"][1].strip()
    assert path.read_bytes().startswith(b"\x89PNG\r\n")


def test_an_exported_adapter_gives_the_trainers_logprobs_in_peft(
    place: Path, commands: Mapping[str, tuple[int, str, str]]
) -> None:
    assert commands["export"][1] == "exported\n"
    base = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, place / "exported").eval()
    run = TrainedRun.read(place / "runs/first")
    engine = archon_engine(load_decoder(place / "model"))
    state = run.state("default")
    engine.add_adapter("a", state.spec)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in state.tensors.items()}
    engine.restore("a", AdapterSnapshot(state=state, exp_avg=zeros, exp_avg_sq=zeros, step=0))
    group = random_group(np.random.default_rng(0), 9, (7, 5))
    batch = weighted_batch("a", [group])
    expected = []
    for rollout in group:
        (turn,) = rollout.turns
        tokens = np.concatenate([turn.prompt, turn.completion.tokens])
        expected.append(reference_logprobs(model, tokens, 1.0)[len(turn.prompt) - 1 :])  # type: ignore[arg-type]
    np.testing.assert_allclose(
        engine.logprobs(batch, "current").logprobs, np.concatenate(expected), atol=1e-4
    )
    moved = np.abs(
        engine.logprobs(batch, "current").logprobs - engine.logprobs(batch, "base").logprobs
    )
    assert moved.max() > 1e-3, "an adapter that does nothing would pass"


# --- signals


class Stopped(NamedTuple):
    """Runs by name: how they ended, at which step, in which state, and how their resume ended."""

    ended: dict[str, tuple[int, str, str]]
    steps: dict[str, int]
    problems: dict[str, list[str]]
    resumed: dict[str, tuple[int, str, str]]


@pytest.fixture(scope="module")
def stopped(place: Path) -> Stopped:
    """A run left alone, and two that are told to stop; all with the same seeds."""
    config = str(write_run(place, "long", **LONG))
    names = {"alone": None, "term": signal.SIGTERM, "int": signal.SIGINT}
    started = {name: start(place, "train", config, f"name={name}") for name in names}
    for name, number in names.items():
        if number is not None:
            wait_for_step(place / "runs" / name, 3)
            started[name].send_signal(number)
    done = {name: ended(process) for name, process in started.items()}
    steps = {name: last(place / "runs" / name).step for name in names}
    problems = {name: check_run(place / "runs" / name) for name in names}
    resumed = {name: start(place, "resume", f"runs/{name}") for name in ("term", "int")}
    return Stopped(done, steps, problems, {n: ended(p) for n, p in resumed.items()})


def wait_for_step(folder: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while not any(int(p.stem) >= step for p in (folder / "manifests").glob("*.json")):
        assert time.monotonic() < deadline, f"{folder} has no step {step} after a minute"
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "number"), [("term", signal.SIGTERM), ("int", signal.SIGINT)])
def test_a_signal_saves_the_run_and_resume_ends_as_if_nothing_had_been(
    place: Path, stopped: Stopped, name: str, number: int
) -> None:
    code, out, errors = stopped.ended[name]
    assert (code, errors) == (128 + number, "")
    step = stopped.steps[name]
    assert 3 <= step < LONG["steps"]
    assert f"saved after step {step}; go on with: lorelei resume runs/{name}\n" in out
    assert stopped.problems[name] == []
    code, out, errors = stopped.resumed[name]
    assert (code, errors) == (0, "")
    assert f"resuming after step {step}" in out and f"done: runs/{name}" in out
    assert check_run(place / "runs" / name) == []
    assert stopped.ended["alone"][0] == 0
    # snapshots with Adam's moments, byte by byte
    assert last(place / "runs" / name).adapters["default"].snapshot == (
        last(place / "runs/alone").adapters["default"].snapshot
    )
    steps = [r["step"] for r in records(place / "runs" / name, "step")]
    assert steps == list(range(1, 26)), "every step is in the log once"


@pytest.mark.slow
def test_a_second_run_in_the_folder_of_the_first_is_refused(place: Path, stopped: Stopped) -> None:
    errors = lorelei(place, "train", "long.yaml", "name=alone", code=2)
    assert errors.startswith("error: name: 'runs/alone' holds a run already; go on with")


# --- what can be trained


def test_training_raises_the_reward(place: Path) -> None:
    folder = train(place, "learns", steps=25, rollout={"n_samples": 8}, algo={"batch_size": 4})
    rewards = [r["reward"] for r in records(folder, "step")]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.1


def test_three_adapters_of_different_shape_train_in_one_run(place: Path) -> None:
    entries = {
        "small": {"lora": {"lora_rank": 2, "target_modules": ["q_proj", "v_proj"]}},
        "fast": {"algo": {"lr": 5e-2, "batch_size": 1}, "steps": 4},
        "sums": {"task": CHAIN_SUM, "lora": {"use_rslora": True}, "rollout": {"n_samples": 3}},
    }
    folder = train(place, "three", adapters=entries, steps=2)
    run = TrainedRun.read(folder)
    versions = {name: e.record.version for name, e in run.manifest.adapters.items()}
    assert versions == {"small": 2, "fast": 4, "sums": 2}
    specs = {name: run.state(name).spec for name in versions}
    assert [s.rank for s in specs.values()] == [2, 4, 4]
    assert [s.rslora for s in specs.values()] == [False, False, True]
    assert len(run.state("small").tensors) < len(run.state("fast").tensors)
    assert {r["adapter"]: r["lr"] for r in records(folder, "step")}["fast"] == 5e-2


def test_an_adapter_trains_among_others_as_it_does_alone(place: Path) -> None:
    alone = train(place, "one", steps=2)
    both = train(place, "two", steps=2, adapters={"default": {}, "other": {"seed": 5}})
    here, there = (TrainedRun.read(f).state("default").tensors for f in (alone, both))
    for name, tensor in here.items():
        # fp32 sums in another order, through two Adam steps
        assert torch.dist(tensor, there[name]) <= 1e-4 * tensor.norm() + 1e-7, name
    assert adapters(both)["default"] != adapters(both)["other"]


def test_asynchronous_training_stays_within_its_staleness(place: Path) -> None:
    folder = train(place, "async", steps=12, rollout={"max_head_offpolicyness": 2})
    staleness = [r["staleness_max"] for r in records(folder, "step")]
    assert max(staleness) <= 2
    assert max(staleness) > 0, "it was not asynchronous at all"
    assert list((folder / "spool").rglob("*.json")) == [], "all groups were used"


@pytest.mark.parametrize("async_steps", [0, 1])
def test_two_minibatches_are_two_optimizer_steps(place: Path, async_steps: int) -> None:
    folder = train(
        place,
        f"minibatches-{async_steps}",
        algo={"ppo_n_minibatches": 2, "kl_ctl": 0.1},
        rollout={"max_head_offpolicyness": async_steps},
    )
    assert last(folder).adapters["default"].record.optimizer_step == 6
    assert records(folder, "step")[-1]["kl_reference"] > 0, "away from the base"


def test_rloo_trains(place: Path) -> None:
    folder = train(place, "rloo", algo={"kind": "rloo"})
    assert all(r["grad_norm"] > 0 for r in records(folder, "step"))
    assert adapters(folder) != adapters(train(place, "grpo"))


def test_recomputed_activations_give_the_same_adapter(place: Path) -> None:
    plain = TrainedRun.read(train(place, "kept")).state("default").tensors
    folder = train(place, "recomputed", train={"gradient_checkpointing": True})
    for name, tensor in TrainedRun.read(folder).state("default").tensors.items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_two_train_workers_give_the_adapter_of_one(place: Path) -> None:
    one = TrainedRun.read(train(place, "worker")).state("default").tensors
    folder = train(place, "workers", train={"workers": 2})
    for name, tensor in TrainedRun.read(folder).state("default").tensors.items():
        # fp32 sums in another order, through three Adam steps
        assert torch.dist(tensor, one[name]) <= 1e-4 * tensor.norm() + 1e-7, name


def test_a_run_without_evaluation_trains_and_eval_says_why_not(place: Path) -> None:
    train(place, "blind", steps=1, eval={"every": 0})
    errors = lorelei(place, "eval", "blind", code=2)
    assert errors == "error: eval.every: 0 in every adapter: the run holds no problems out\n"


# --- warm start


@pytest.fixture(scope="module")
def warm(place: Path) -> Path:
    """An adapter that peft made."""
    base = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(place / "warm")
    return place / "warm"


def test_a_run_starts_from_an_adapter_that_peft_made(place: Path, warm: Path) -> None:
    folder = train(place, "warm", lora={"init_from": "warm"}, steps=1)
    (first,) = (folder / "snapshots/default").glob("000000-*")
    tensors = load_file(first)
    for name, tensor in load_file(warm / "adapter_model.safetensors").items():
        assert torch.equal(tensors[name], tensor), name
    assert last(folder).adapters["default"].record.optimizer_step == 1


def test_a_run_resumes_without_the_adapter_it_started_from(place: Path, warm: Path) -> None:
    folder = train(place, "moved", lora={"init_from": "warm"}, steps=1)
    (newest,) = (folder / "manifests").glob("000001.json")
    newest.unlink()
    (warm / "adapter_config.json").rename(warm / "away")
    try:
        local.resume(folder)
    finally:
        (warm / "away").rename(warm / "adapter_config.json")
    assert last(folder).step == 1 and check_run(folder) == []


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        ({"lora_rank": 8}, "has lora_rank 4, adapter 'default' has 8; set lora.lora_rank: 4"),
        ({"lora_alpha": 16}, "has lora_alpha 8, adapter 'default' has 16.0; set"),
        ({"use_rslora": True}, "has use_rslora False, adapter 'default' has True; set"),
        ({"target_modules": ["q_proj"]}, "does not target; set lora.target_modules: ["),
    ],
)
def test_an_adapter_of_another_shape_is_refused(
    place: Path, warm: Path, lora: Mapping[str, Any], expected: str
) -> None:
    with pytest.raises(ValueError) as caught:
        train(place, "refused", lora={"init_from": "warm", **lora})
    assert str(caught.value).startswith("lora.init_from: ") and expected in str(caught.value)
    assert not (place / "runs/refused").exists()


def test_an_adapter_with_ranks_by_module_is_refused(place: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", rank_pattern={"q_proj": 2})
    get_peft_model(base, lora).save_pretrained(place / "patterned")
    with pytest.raises(ValueError, match=r"adapter_config.json: rank_pattern: .* has rank 4 and "):
        train(place, "refused", lora={"init_from": "patterned"})
    assert not (place / "runs/refused").exists()


def test_a_suggested_target_starts_from_an_adapter_on_some_layers_and_the_head(
    place: Path,
) -> None:
    base = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    lora = LoraConfig(
        r=4, lora_alpha=8, target_modules=r"lm_head|model\.layers\.1\..*\.(q_proj|up_proj)"
    )
    get_peft_model(base, lora).save_pretrained(place / "some")  # with the head's base_layer
    with pytest.raises(ValueError, match=r"set lora.target_modules: \[") as caught:
        train(place, "suggested", lora={"init_from": "some"})
    targets = json.loads(str(caught.value).partition("lora.target_modules: ")[2])
    start = {"init_from": "some", "target_modules": targets}
    folder = train(place, "suggested", lora=start, steps=1)
    assert last(folder).step == 1


def test_a_mixture_is_exported_with_fused_experts_and_started_from(place: Path) -> None:
    make_tiny("qwen3_moe", place / "moe")
    for file in (place / "model").glob("*token*"):
        shutil.copy(file, place / "moe")
    folder = train(place, "mixture", model=str(place / "moe"), steps=1)
    lorelei(place, "export", "mixture", "--experts", "fused-0.18", "--out", "fused")
    state, back = TrainedRun.read(folder).state("default"), read_peft_folder(place / "fused")
    assert back.tensors.keys() == state.tensors.keys()
    assert all(torch.equal(back.tensors[name], state.tensors[name]) for name in state.tensors)
    config = json.loads((place / "fused/adapter_config.json").read_text())
    assert "model.layers.0.mlp.experts.down_proj" in config["target_parameters"]
    again = train(place, "again", model=str(place / "moe"), lora={"init_from": "fused"}, steps=1)
    assert last(again).step == 1


def test_a_tokenizer_folder_is_all_that_is_needed_of_transformers(place: Path) -> None:
    assert len(AutoTokenizer.from_pretrained(place / "model")) == 300
