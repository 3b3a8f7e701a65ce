"""Files that do not train LoRA by GRPO on gsm8k: what they become, or why they are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lorelei.algo.overlong import OverlongPenalty
from lorelei.algo.rejection import RejectionSampling
from lorelei.areal.outcomes import outcomes, section
from lorelei.areal.report import lines
from lorelei.config.errors import ConfigError
from lorelei.run_file import dump_set, load_config, read_config
from tests.areal.examples import example

TO_LORA = ("actor.use_lora=true", "rollout.use_lora=true")
FULL = {"actor": {"use_lora": False}, "rollout": {"use_lora": False}}
SFT: dict[str, Any] = {
    "experiment_name": "e",
    "trial_name": "t",
    "total_train_epochs": 2,
    "actor": {
        "backend": "fsdp:d2",
        "path": "m/m",
        "dtype": "bfloat16",
        "optimizer": {"lr": 2.0e-5, "lr_scheduler_type": "cosine", "min_lr_ratio": 0.1},
    },
    "train_dataset": {"path": "openai/gsm8k", "type": "sft", "batch_size": 128},
    "valid_dataset": {"path": "openai/gsm8k", "type": "sft"},
    "evaluator": {"freq_epochs": 1},
}


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    out = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        out[key] = merged(below[key], value) if both else value
    return out


@pytest.fixture
def written(tmp_path: Path):
    """Writes a file: the LoRA example, or another, with changes."""

    def write(changes: dict[str, Any], base: dict[str, Any] | None = None) -> Path:
        whole = base or yaml.safe_load(example("gsm8k_grpo_lora").read_text())
        path = tmp_path / "file.yaml"
        path.write_text(yaml.safe_dump(merged(whole, changes), sort_keys=False))
        return path

    return write


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_full_fine_tuning_says_what_runs_it_and_that_does(written):
    path = written(FULL)
    line = refusal(path)
    assert line.startswith("actor.use_lora: false (AReaL's default) is full fine-tuning")
    assert "for LoRA give `actor.use_lora=true rollout.use_lora=true`" in line
    assert load_config(path, TO_LORA).lora.use_lora
    whole = line.rpartition("for all weights `")[2].rstrip("`")
    assert "rollout={kind: embedded}" in whole
    overrides = ["actor.dtype=float32", "rollout={kind: embedded}", "publish.kind=memory"]
    assert all(override in whole for override in overrides)
    config = load_config(path, overrides)
    assert (config.lora.use_lora, config.dtype, config.rollout.kind) == (
        False,
        "float32",
        "embedded",
    )


def test_full_fine_tuning_by_megatron_needs_the_bridge_that_trains_lora(written):
    changes = merged(FULL, {"actor": {"backend": "megatron:d4", "megatron": {"bridge_type": None}}})
    path = written(changes)
    line = refusal(path)
    assert "rollout.use_lora=true actor.megatron.bridge_type=megatron-bridge`" in line
    assert "actor.backend=fsdp:d1" in line
    bridge = "actor.megatron.bridge_type=megatron-bridge"
    assert load_config(path, [*TO_LORA, bridge]).train.kind == "megatron"


def test_supervised_files_become_jobs_of_kind_sft(written):
    path = written({}, SFT)
    assert refusal(path).startswith("actor.use_lora: false")
    loaded = read_config(path, ["actor.use_lora=true"])
    (experiment,) = loaded.config.experiments()
    assert (experiment.algo.kind, experiment.algo.batch_size) == ("sft", 128)
    assert (experiment.steps, experiment.eval.every) == (2 * (7473 // 128), 7473 // 128)
    assert (experiment.task.path, experiment.task.prompt_template) == ("openai/gsm8k", "{question}")
    assert experiment.optimizer.min_lr_ratio == 0.1
    assert (loaded.config.train.kind, loaded.config.reward) == ("fsdp", None)
    again = path.with_name("ours.yaml")
    again.write_text(dump_set(loaded.config))
    assert load_config(again).experiments() == loaded.config.experiments()
    assert load_config(path, ["actor.dtype=float32"]).lora.use_lora is False
    text = "\n".join(lines(loaded.translation, "x"))
    assert "train_dataset.type: sft  ->  algo.kind: sft" in text


def test_servers_of_a_supervised_file_are_not_read(written):
    unread = {"rollout": {"backend": "vllm:d1"}, "vllm": {"max_lora_rank": 1, "model": "x"}}
    loaded = read_config(written(unread, SFT), ["actor.use_lora=true"])
    assert loaded.config.rollout.kind == "embedded"
    text = "\n".join(lines(loaded.translation, "x"))
    assert "vllm.model: x: nothing is sampled with train_dataset.type: sft" in text


def test_sections_of_an_examples_own_class_are_asked_for_as_what_they_are(written):
    path = written({"workflow": "pkg.agents.Agent", "econfig": {"domain": "airline"}})
    assert refusal(path) == (
        "env: workflow: 'pkg.agents.Agent' is a setting of the example's own class, for the Python "
        "code beside it; give env={kind: agent, path: FILE.py:FN}, or workflow=null for single "
        "answers"
    )
    assert refusal(path, "workflow=null").startswith("env: econfig.domain: 'airline' is a setting")
    config = load_config(path, ["workflow=null", "econfig=null"])
    assert config.env.kind == "single_turn"
    agent = path.with_name("agent.py")
    agent.write_text("async def run(client, data):\n    return 1.0\n")
    loaded = read_config(path, [f"env={{kind: agent, path: {agent}:run}}"])
    assert loaded.config.env.kind == "agent"
    text = "\n".join(lines(loaded.translation, "x"))
    assert "econfig.domain: airline: a setting of the example's own class" in text


def test_null_removes_a_key_known_or_not(written):
    path = written({"fancy": {"x": 1}, "actor": {"kl_ctl": 0.5, "lora_rnak": 4}})
    assert refusal(path).startswith("actor.lora_rnak: unknown key; did you mean 'lora_rank'?")
    line = refusal(path, "actor.lora_rnak=null")
    assert line == (
        "fancy.x: unknown key; no option class of AReaL's has it; fancy=null leaves it out"
    )
    config = load_config(path, ["actor.lora_rnak=null", "fancy=null", "actor.kl_ctl=null"])
    assert config.algo.kl_ctl == 0.1, "AReaL's default"
    assert load_config(path, ["actor.lora_rnak=null", "fancy=null"]).algo.kl_ctl == 0.5


def test_a_reference_may_be_to_a_default_of_areals_classes(written):
    data = yaml.safe_load(example("gsm8k_grpo_lora").read_text())
    del data["gconfig"]["max_new_tokens"], data["gconfig"]["max_tokens"]
    changes = {"actor": {"max_new_tokens": "${gconfig.max_new_tokens}"}}
    assert load_config(written(changes, data)).rollout.max_new_tokens == 16384


OBJECTIVES: list[tuple[dict[str, Any], str]] = [
    ({"critic": {"backend": "fsdp:d4"}}, "PPO with a critic, which is not built yet; critic=null"),
    ({"teacher": {"path": "m/m"}}, "distillation from a teacher, which is not built yet"),
    ({"actor": {"prox_logp_method": "loglinear"}}, "is an approximation of the proximal policy"),
    ({"train_dataset": {"type": "dpo"}, "actor": {"beta": 0.1}}, "type: 'dpo' is DPO, which is"),
    ({"train_dataset": {"type": "rw"}}, "train_dataset.type: 'rw' is a reward model, which is not"),
]


@pytest.mark.parametrize(("changes", "words"), OBJECTIVES)
def test_an_objective_that_is_not_built_yet_is_named_before_all_else(written, changes, words):
    assert words in refusal(written(merged(FULL, changes)))


def test_a_vision_file_with_lora_reaches_its_contradiction_and_one_without_its_images(written):
    images = {
        "actor": {"path": "Qwen/Qwen2.5-VL-3B-Instruct"},
        "train_dataset": {"path": "hiyouga/geometry3k"},
        "valid_dataset": {"path": "hiyouga/geometry3k"},
        "rollout": {"use_lora": False},
    }
    assert refusal(written(merged(images, {"actor": {"use_lora": True}}))) == (
        "rollout.use_lora: false contradicts actor.use_lora: true; else rollouts silently "
        "sample the base model: make them equal, such as rollout.use_lora: ${actor.use_lora}"
    )
    assert "'hiyouga/geometry3k' has images, and models read only text here" in refusal(
        written(merged(images, {"actor": {"use_lora": False}}))
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"actor": {"kl_ctl": 0.1}, "ref": None}, "actor.kl_ctl: 0.1 without a section `ref`"),
        (
            {"actor": {"kl_ctl": 0.1, "rejection_sampling": None}},
            "give actor.rejection_sampling={upper: 5.0}",
        ),
        (
            {"actor": {"reward_norm": {"group_size": None}}},
            "actor.reward_norm.group_size: 1 contradicts gconfig.n_samples: 4",
        ),
        ({"train_dataset": {"shuffle": False}}, "train_dataset.shuffle: false cannot be done"),
        ({"train_dataset": {"dataset_kwargs": {"x": 1}}}, "train_dataset.dataset_kwargs.x: 1"),
        ({"valid_dataset": {"path": "a.jsonl"}}, "eval: valid_dataset.path: 'a.jsonl' is other"),
        (
            {"actor": {"use_sapo_loss": True}},
            "actor.use_sapo_loss: true contradicts actor.use_decoupled_loss: true, in AReaL too;",
        ),
        (
            {
                "actor": {
                    "use_sapo_loss": True,
                    "use_decoupled_loss": False,
                    "importance_sampling_level": "sequence",
                }
            },
            "actor.importance_sampling_level: sequence with use_sapo_loss cannot be done here",
        ),
        (
            {"actor": {"m2_threshold": 0.04, "ppo_n_minibatches": 2}},
            "actor.ppo_n_minibatches: 2 with m2_threshold cannot be done here, where M2PO clips",
        ),
        (
            {"actor": {"rejection_sampling": {"level": "sequence", "agg": "sum"}}},
            "actor.rejection_sampling.agg: sum of ratios weighs by their mean in AReaL",
        ),
        (
            {"actor": {"overlong_reward_penalty": True, "overlong_tokens": 9}},
            "actor.overlong_penalty_factor: is required with actor.overlong_reward_penalty: true",
        ),
        ({"actor": {"use_cispo_loss": True}}, "set algo.kind=cispo, whose bounds are"),
        ({"dynamic_bs": True}, "dynamic_bs: true cannot be done here; a step takes batch_size"),
        ({"rollout": {"agent": {"mode": "online"}}}, 'rollout.agent.mode: "online" cannot be done'),
    ],
)
def test_values_that_cannot_mean_the_same_are_refused(written, changes, words):
    assert words in refusal(written(changes))


def test_fp8_is_refused_by_the_engine_that_would_do_it_and_not_read_for_another(written):
    fp8 = {"actor": {"megatron": {"fp8_config": {"mode": "hybrid"}, "bridge_type": None}}}
    assert load_config(written(fp8)).train.kind == "fsdp"
    fp8["actor"]["backend"] = "megatron:d4"
    assert 'actor.megatron.fp8_config.mode: "hybrid" cannot be done' in refusal(written(fp8))


def test_a_decoupled_loss_without_rejection_has_no_weight(written):
    algo = load_config(written({"actor": {"rejection_sampling": None}})).algo
    assert (algo.use_decoupled_loss, algo.recompute_logprob) == (False, True)


PLAIN = {"use_decoupled_loss": False, "recompute_logprob": False}


@pytest.mark.parametrize(
    ("actor", "kind", "expected"),
    [
        (
            {"importance_sampling_level": "sequence"},
            "gspo",
            {"eps_clip": 0.4, "eps_clip_higher": None, "loss_aggregation": "token"},
        ),
        (
            {"use_sapo_loss": True, "sapo_tau_neg": 1.2, **PLAIN},
            "sapo",
            {"tau_pos": 1.0, "tau_neg": 1.2, "loss_aggregation": "token"},
        ),
        (
            {"m2_threshold": 0.04, "eps_clip": 0.0},
            "m2po",
            {"m2_threshold": 0.04, "use_decoupled_loss": True, "loss_aggregation": "token"},
        ),
        ({"m2_threshold": 0.04, **PLAIN}, "grpo", {"use_decoupled_loss": False}),
        ({"c_clip": 3.0}, "grpo", {"c_clip": 3.0}),
        (
            {
                "eps_clip_higher": 0.28,
                "overlong_reward_penalty": True,
                "overlong_tokens": 64,
                "overlong_penalty_factor": 0.5,
            },
            "grpo",
            {"overlong_penalty": OverlongPenalty(buffer=64, factor=0.5)},
        ),
        (
            {"rejection_sampling": {"level": "sequence", "action": "clamp", "upper": 3.0}},
            "grpo",
            {"rejection_sampling": RejectionSampling(level="sequence", action="clamp", upper=3.0)},
        ),
    ],
)
def test_an_objective_of_areal_is_a_kind_with_its_settings(written, actor, kind, expected):
    algo = load_config(written({"actor": actor})).algo
    assert algo.kind == kind
    assert {key: getattr(algo, key) for key in expected} == expected


def test_evaluation_has_the_sampling_of_eval_gconfig(written):
    config = load_config(written({"eval_gconfig": {"max_new_tokens": 9, "top_k": 100_000_000}}))
    assert (config.eval.temperature, config.eval.max_new_tokens, config.eval.top_k) == (1.0, 9, 0)
    greedy = {"eval_gconfig": {"greedy": True, "temperature": 0.6}, "dynamic_bs": False}
    assert load_config(written(greedy)).eval.temperature == 0.0


def test_no_devices_are_cpus(written):
    config = load_config(written({"cluster": {"n_gpus_per_node": 0}}))
    assert config.machine.devices is None


def test_warm_up_steps_take_the_place_of_their_share(written):
    config = load_config(written({"actor": {"optimizer": {"warmup_steps": 12}}}))
    assert config.optimizer.warmup_steps == 12


def test_files_that_describe_no_run_say_what_they_are(tmp_path):
    path = tmp_path / "task.yaml"
    path.write_text("resources: {cpus: 8}\nrun: python train.py\n")
    assert refusal(path).startswith("resources: this is a task for SkyPilot")
    path.write_text("env_vars: {NCCL_DEBUG: WARN}\n")
    assert refusal(path).startswith("env_vars: these are environment variables, and no run")
    path.write_text("experiment_name: e\nactor: null\ngconfig: {n_samples: 4}\n")
    assert refusal(path) == "actor: is required; a file without it samples, and trains nothing"


def test_the_table_says_what_becomes_of_every_file_of_a_folder(written, tmp_path):
    (tmp_path / "math").mkdir()
    written(FULL).rename(tmp_path / "math" / "full.yaml")
    (tmp_path / "lora.yaml").write_text(example("gsm8k_grpo_lora").read_text())
    written({"critic": {"path": "m/m"}}).rename(tmp_path / "ppo.yaml")
    found = outcomes(tmp_path)
    assert [(one.file, one.overrides) for one in found] == [
        ("lora.yaml", ()),
        ("math/full.yaml", TO_LORA),
        ("ppo.yaml", ()),
    ]
    text = section(found, "0123456789abcdef")
    assert "at its commit `0123456789ab`" in text
    assert "1 load as they are, 1 load with LoRA's overrides, 0 are refused with them" in text
    assert "| `lora.yaml` | loads |  |" in text
    assert "| `math/full.yaml` | full fine-tuning | loads |" in text
    assert "| `ppo.yaml` | critic.path:" in text
