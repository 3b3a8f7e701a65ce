"""AReaL's files, trained from the command line as users start it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from acceptance.areal import CASES, SMALL, problems, row, run, workplace
from tests.areal.examples import example
from tests.environments import needs
from tests.tiny_runs import lorelei, make_workplace, records

HERE = (  # what needs no server
    "actor.backend=archon:d1",
    "rollout={kind: embedded, n_samples: 4, max_new_tokens: 8, max_head_offpolicyness: 2}",
    "publish={kind: memory}",
    "task={kind: jsonl, path: rows.jsonl}",
    "reward={kind: python, path: 'rewards.py:vowels', workers: 1}",
    "runs_dir=runs",
    "name=run",
)


@pytest.fixture
def place(tmp_path: Path, tiny_tokenizer) -> Path:
    return make_workplace(tmp_path, tiny_tokenizer)


def test_an_example_trains_and_says_what_its_keys_became(place):
    file = str(example("gsm8k_grpo_lora"))
    out = lorelei(place, "train", file, *SMALL, *HERE, errors=True)
    assert "gsm8k_grpo_lora.yaml is a file of AReaL; it becomes" in out
    assert "  actor.optimizer.lr: 0.01  ->  optimizer.lr: 0.01" in out
    assert "rollout.queue_size: null: rollouts in flight are bounded" in out
    steps = records(place / "runs" / "run", "step")
    assert [step["adapter"] for step in steps] == ["lora-gsm8k"] * 3


@pytest.mark.slow
def test_what_is_converted_trains_to_the_same_adapter(place):
    file = str(example("gsm8k_grpo_lora"))
    here = [o for o in HERE if "name=" not in o]
    here += ["rollout.max_head_offpolicyness=0"]
    lorelei(place, "train", file, *SMALL, *here, "name=theirs")
    lorelei(place, "convert", file, *SMALL, *here, "name=ours", "-o", "ours.yaml")
    assert "actor" not in yaml.safe_load((place / "ours.yaml").read_text())
    lorelei(place, "train", "ours.yaml")
    ours, theirs = (records(place / "runs" / name, "step") for name in ("ours", "theirs"))
    for key in ("reward", "loss", "grad_norm", "kl_sampler"):
        assert [s[key] for s in ours] == [s[key] for s in theirs], key


def test_a_converted_file_is_not_written_over_another(place):
    (place / "run.yaml").write_text("model: m/m\n")
    error = lorelei(place, "convert", str(example("gsm8k_grpo_lora")), "-o", "run.yaml", code=2)
    assert "--out: 'run.yaml' exists; give another name or remove it" in error


@pytest.mark.brief
@needs("vllm")
def test_an_example_trains_over_a_server(tmp_path):
    case = CASES["vllm-lora"]
    text, steps = run(case, workplace(case.family, tmp_path))
    assert problems(case, row(case, text, steps)) == []
