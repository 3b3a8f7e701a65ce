"""Whether a run fits, what would make it fit, and what a plan refuses to ignore."""

from __future__ import annotations

import json
import sys

import pytest

from lorelei.cli import main as cli
from lorelei.config.errors import ConfigError
from lorelei.plan import hardware
from lorelei.plan.format import plan_table
from lorelei.plan.hardware import Hardware, this_machine
from lorelei.plan.plan import plan
from lorelei.run_file import load_config

MIB, GIB = 1 << 20, 1 << 30
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32_000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": False,
}
ROLLOUT = "rollout={n_samples: 8, max_new_tokens: 16}"
SMALL = (  # a run whose base model is the largest part
    "rollout={n_samples: 2, max_new_tokens: 16}",
    "task.max_prompt_tokens=32",
    "train={gradient_checkpointing: true, max_tokens_per_mb: 64}",
    "lora.target_modules=q_proj",
    "reward={kind: reasoning_gym, workers: 1}",
)


@pytest.fixture
def run_file(tmp_path, monkeypatch):
    """A run on a model of which there is only a config.json, on a machine of CPUs."""
    monkeypatch.setattr(hardware, "has_accelerator", lambda: False)
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    path = tmp_path / "run.yaml"
    path.write_text("model: .\ntask: {kind: reasoning_gym, name: chain_sum}\neval: {every: 0}\n")
    return path


@pytest.mark.parametrize(
    ("overrides", "gib", "phase", "change"),
    [
        ((*SMALL, "dtype=bfloat16"), 0.7, "loading", "take a smaller model"),
        (("rollout.max_new_tokens=30000",), 2, "sampling", "lower rollout.max_running"),
        (
            (
                "rollout.max_new_tokens=64",
                "eval={every: 1, n_prompts: 5000}",
                "rollout.max_running=5000",
            ),
            2,
            "evaluating",
            "lower rollout.max_running",
        ),
        (
            (ROLLOUT, "algo.batch_size=64", "train.max_tokens_per_mb=16384"),
            2,
            "training",
            "set train.gradient_checkpointing: true",
        ),
        (
            (
                ROLLOUT,
                "algo.batch_size=256",
                "train.max_tokens_per_mb=32768",
                "train.gradient_checkpointing=true",
            ),
            1.2,
            "training",
            "lower train.max_tokens_per_mb",
        ),
        ((ROLLOUT, "lora.lora_rank=512"), 1.2, "saving", "lower lora.lora_rank"),
        (
            (ROLLOUT, "reward={kind: reasoning_gym, workers: 16}"),
            2,
            "training",
            "lower reward.workers",
        ),
    ],
)
def test_the_largest_part_of_the_phase_that_needs_most_is_to_be_changed(
    run_file, overrides, gib, phase, change
):
    config = load_config(run_file, overrides)
    made = plan(config, Hardware(memory=int(gib * GIB)))
    (problem,) = made.problems
    assert problem.startswith("this machine would hold ")
    assert f"GiB of {gib:.1f} while {phase}; " in problem and change in problem


def test_a_model_that_bfloat16_makes_fit_is_told_so(run_file):
    made = plan(load_config(run_file, SMALL))
    short = Hardware(memory=made.total_memory - 10 * MIB)
    (problem,) = plan(load_config(run_file, SMALL), short).problems
    assert "set dtype: bfloat16" in problem
    assert plan(load_config(run_file, [*SMALL, "dtype=bfloat16"]), short).problems == ()


def test_without_devices_the_memory_of_the_machine_counts(run_file):
    made = plan(load_config(run_file, []))
    memory = this_machine().memory
    assert memory is not None and made.device_memory == memory > 100 * MIB
    assert made.problems == ()
    assert sum(g.bytes * len(g.places) for g in made.processes) == made.total_memory


def test_every_process_on_the_cpus_counts(run_file):
    config = load_config(run_file, [ROLLOUT, "train.workers=4"])
    made = plan(config, Hardware(memory=1 << 40))
    (problem,) = plan(config, Hardware(memory=GIB)).problems
    held = made.total_memory  # four workers' programs and base models among it
    assert held > 2 * plan(load_config(run_file, [ROLLOUT])).total_memory
    assert f"this machine would hold {held / GIB:.1f} GiB of 1.0 while training; " in problem


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["lorelei", "plan", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code, *capsys.readouterr()


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_the_exit_code_says_whether_it_fits(run_file, monkeypatch, capsys, flags):
    code, out, _ = command(monkeypatch, capsys, run_file, *flags)
    assert code == 0
    assert flags or "of this machine" in out
    monkeypatch.setattr(hardware, "_cpu_memory", lambda: 100 * MIB)
    code, out, _ = command(monkeypatch, capsys, run_file, *flags)
    assert code == 1
    assert "does not fit: this machine would hold" in out or json.loads(out)["problems"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--memory", "80GB"), "machine.memory: '80GB' is of each accelerator"),
        (("machine.memory=80GB",), "machine.memory: '80GB' is of each accelerator"),
        (("--nodes", "2"), "machine.nodes: 2 are planned with machine.devices"),
        (("machine.nodes=2",), "machine.nodes: 2 are planned with machine.devices"),
        (("--nodes", "2", "--memory", "80GB"), "machine.nodes: 2 are planned with"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    run_file, monkeypatch, capsys, arguments, expected
):
    code, out, said = command(monkeypatch, capsys, run_file, *arguments)
    assert (code, out) == (2, "")
    assert said.startswith(f"error: {expected}") and "--devices" in said


def test_a_devices_memory_may_be_given_where_it_has_devices(run_file, monkeypatch):
    monkeypatch.setattr(hardware, "this_machine", lambda: Hardware(devices=1))
    config = load_config(run_file, ["machine.memory=200MB"])
    (problem,) = plan(config, hardware.wanted(config.machine)).problems
    assert problem.startswith("machine.memory: gpu 0 would hold ")
    plan_table(plan(config, hardware.wanted(config.machine)))


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("train={kind: archon, workers: 1000000000}",), "train: 1000000000 processes are more"),
        (
            ("train={kind: fsdp, data_parallel: 100000, tensor_parallel: 4}",),
            "train: 400000 processes are more",
        ),
        (
            ("rollout={kind: vllm, replicas: 50000, tensor_parallel_size: 4}",),
            "rollout.replicas: 200000 processes are more",
        ),
        (("reward.workers=1000000000",), "reward.workers: 1000000000 is not allowed"),
        (("rollout.n_samples=1000000000",), "rollout.n_samples: 1000000000 is not allowed"),
        (("eval.n_prompts=1000000000",), "eval.n_prompts: 1000000000 is not allowed"),
        (("threads=1000000",), "threads: 1000000 is not allowed"),
    ],
)
def test_numbers_that_nobody_means_are_refused_before_they_fill_the_memory(
    run_file, overrides, line
):
    with pytest.raises(ConfigError, match=line):
        plan(load_config(run_file, ("reward.kind=reasoning_gym", *overrides)))
