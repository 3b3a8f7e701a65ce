"""Runs with lora.use_lora: false: trained, killed, resumed, scored, exported."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lorelei.cli.trained_run import TrainedRun
from lorelei.lora.peft_folder import write_peft_folder
from lorelei.model.load import load_decoder
from lorelei.store.check import check_run
from lorelei.store.durable import StoreError
from lorelei.store.model_folder import write_model_folder
from lorelei.types import AdapterSpec
from tests.tiny_runs import lorelei, make_workplace, records, start, write_run

STEPS = 8
FULL = {"steps": STEPS, "lora": {"use_lora": False}, "algo": {"lr": 1e-3, "kl_ctl": 0.05}}


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A workplace in which a run was left alone."""
    folder = make_workplace(tmp_path_factory.mktemp("place"), tiny_tokenizer)
    write_run(folder, "alone", **FULL)
    lorelei(folder, "train", "alone.yaml")
    return folder


def final(folder: Path) -> str:
    """The snapshot after the last step; its name has its digest."""
    assert check_run(folder) == []
    manifest = TrainedRun.read(folder).manifest
    assert manifest.state["finished"] is True
    return manifest.adapters["default"].snapshot


def test_every_weight_moves_and_the_sampler_follows(place: Path) -> None:
    run = TrainedRun.read(place / "runs/alone")
    trained = run.state("default").tensors
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    for name, tensor in base.named_parameters():
        assert not torch.equal(trained[name], tensor), name
    steps = records(place / "runs/alone", "step")
    assert [r["optimizer_step"] for r in steps] == list(range(1, STEPS + 1))
    assert max(r["kl_sampler"] for r in steps) < 1e-6, "the sampler does not have the new weights"
    assert steps[-1]["kl_reference"] > 1e-6, "the reference is not the base"


@pytest.mark.slow
def test_a_run_killed_and_resumed_ends_as_one_left_alone(place: Path) -> None:
    folder = place / "runs/killed"
    process = start(place, "train", "alone.yaml", "name=killed")
    wait_for(folder / "manifests/000001.json")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / f"manifests/{STEPS:06d}.json").exists(), "it was killed too late"
    assert "resuming after step" in lorelei(place, "resume", "killed")
    assert final(folder) == final(place / "runs/alone")


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"there is no {path} after a minute"
        time.sleep(0.0005)


@pytest.mark.slow
def test_two_train_workers_give_the_weights_of_one(place: Path) -> None:
    lorelei(place, "train", "alone.yaml", "name=workers", "train.workers=2", "steps=2")
    lorelei(place, "train", "alone.yaml", "name=worker", "steps=2")
    one, two = (TrainedRun.read(place / "runs" / name) for name in ("worker", "workers"))
    for name, tensor in one.state("default").tensors.items():
        # fp32 sums in another order, through two Adam steps
        moved = torch.dist(tensor, two.state("default").tensors[name])
        assert moved <= 1e-4 * tensor.norm() + 1e-7, name


def test_asynchronous_training_decodes_old_and_new_weights(place: Path) -> None:
    limits = ("steps=6", "rollout.max_head_offpolicyness=2", "eval.every=0")
    lorelei(place, "train", "alone.yaml", "name=async", *limits)
    assert final(place / "runs/async")
    assert max(r["staleness_max"] for r in records(place / "runs/async", "step")) > 0


def test_eval_and_chat_use_the_trained_weights(place: Path) -> None:
    scores = json.loads(lorelei(place, "eval", "alone", "--json", "--base"))["default"]
    logged = [r["scores"] for r in records(place / "runs/alone", "eval")]
    assert [scores["base"], scores[f"v{STEPS}"]] == [logged[0], logged[-1]]
    assert lorelei(place, "chat", "alone").startswith(f"default@v{STEPS} answers")


@pytest.mark.slow
def test_an_exported_run_is_a_checkpoint_that_transformers_and_lorelei_read(place: Path) -> None:
    out = place / lorelei(place, "export", "alone", "--out", "exported").strip()
    run = TrainedRun.read(place / "runs/alone")
    trained = run.state("default").tensors
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.float32
    assert {n: t.shape for n, t in model.named_parameters()} == {
        n: t.shape for n, t in trained.items()
    }
    assert all(torch.equal(t, trained[n]) for n, t in model.named_parameters())
    assert AutoTokenizer.from_pretrained(out).chat_template
    assert load_decoder(out).embedding.equal(trained["model.embed_tokens.weight"])
    write_run(place, "more", model="./exported", steps=1)
    assert "done: runs/more" in lorelei(place, "train", "more.yaml")


def test_full_weights_are_no_peft_folder_and_an_adapter_is_no_checkpoint(place: Path) -> None:
    state = TrainedRun.read(place / "runs/alone").state("default")
    with pytest.raises(StoreError, match="full weights are not a PEFT adapter"):
        write_peft_folder(place / "peft", state, "model")
    lora = type(state)(spec=AdapterSpec(rank=1, alpha=1), tensors={})
    with pytest.raises(StoreError, match="a LoRA adapter is no checkpoint"):
        write_model_folder(place / "checkpoint", lora, place / "model", {})


def test_plan_counts_every_parameter(place: Path) -> None:
    planned = json.loads(lorelei(place, "plan", "alone.yaml", "--json"))
    (adapter,) = planned["adapters"]
    expected = AutoModelForCausalLM.from_pretrained(place / "model").num_parameters()
    assert adapter["parameters"] == planned["total_parameters"] == expected
    assert "full" in lorelei(place, "plan", "alone.yaml")
