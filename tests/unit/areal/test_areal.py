"""AReaL's files become configurations of ours, key by key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorelei.areal import page
from lorelei.areal.file import BELOW
from lorelei.areal.report import fates, lines
from lorelei.areal.rules import RULES
from lorelei.config.errors import ConfigError
from lorelei.run_file import dump_set, load_config, read_config
from tests.areal.examples import EXAMPLES, example

NORM = {
    "weigh_by": "rollout",
    "mean_leave1out": False,
    "std_unbiased": True,
    "std_around": "own_mean",
    "eps": 1e-5,
}
# every value that the reference page gives for all three, by our key
SHARED = {
    "seed": 1,
    "steps": 10 * (7473 // 256),
    "runs_dir": "/tmp/areal/experiments",
    "machine.nodes": 1,
    "machine.devices": 8,
    "dtype": "bfloat16",
    "train.max_tokens_per_mb": 10240,
    "rollout.n_samples": 4,
    "rollout.max_new_tokens": 1024,
    "rollout.max_context": 2048,
    "rollout.temperature": 1.0,
    "rollout.max_head_offpolicyness": 2,
    "rollout.max_concurrent": 256,
    "rollout.max_running": 256,
    "rollout.reserve_rank": 0,
    "lora.use_lora": True,
    "lora.peft_type": "lora",
    "lora.lora_dropout": 0.0,
    "algo.kind": "grpo",
    "optimizer.beta1": 0.9,
    "optimizer.beta2": 0.999,
    "optimizer.eps": 1e-8,
    "optimizer.gradient_clipping": 1.0,
    "optimizer.warmup_steps": 0,
    "algo.eps_clip": 0.4,
    "algo.eps_clip_higher": None,
    "algo.reward_scaling": 10.0,
    "algo.reward_bias": -0.5,
    "algo.kl_ctl": 0.0,
    "algo.ppo_n_minibatches": 1,
    "algo.recompute_logprob": True,
    "algo.use_decoupled_loss": True,
    "algo.rejection_sampling": {
        "level": "token",
        "action": "mask",
        "metric": "ratio",
        "agg": "mean",
        "upper": 5.0,
        "lower": None,
    },
    "algo.reward_norm": {**NORM, "mean_level": "group", "std_level": "group"},
    "algo.adv_norm": {**NORM, "mean_level": "batch", "std_level": "batch", "weigh_by": "token"},
    "algo.reward_clip": 20.0,
    "algo.use_kl_in_reward": False,
    "algo.drop_zero_variance_groups": False,
    "task.kind": "hf",
    "task.path": "openai/gsm8k",
    "task.name": "main",
    "task.split": "train",
    "task.max_prompt_tokens": 1024,
    "task.long_prompts": "drop",
    "reward.kind": "math_verify",
    "eval.every": 7473 // 256,
}
FUSED = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
VLLM_ARGS = {"gpu-memory-utilization": 0.9, "enforce-eager": True}
# the table of the page: what differs
OWN: dict[str, dict[str, Any]] = {
    "gsm8k_grpo_lora": {
        "name": "gsm8k-grpo-lora-trial0",
        "model": "Qwen/Qwen2.5-1.5B-Instruct",
        "rollout.kind": "sglang",
        "rollout.replicas": 4,
        "rollout.tensor_parallel_size": 1,
        "rollout.extra_args": {"mem-fraction-static": 0.8},
        "train.kind": "fsdp",
        "train.data_parallel": 4,
        "train.tensor_parallel": 1,
        "train.gradient_checkpointing": True,
        "publish.kind": "disk",
        "lora.lora_rank": 16,
        "lora.lora_alpha": 16.0,
        "lora.target_modules": ("all-linear",),
        "optimizer.lr": 1.7e-4,
        "optimizer.weight_decay": 0.017,
        "optimizer.lr_schedule": "constant",
        "algo.batch_size": 256,
    },
    "gsm8k_grpo_megatron_lora": {
        "name": "gsm8k-grpo-megatron-lora-trial0",
        "model": "Qwen/Qwen3-0.6B",
        "rollout.kind": "vllm",
        "rollout.replicas": 4,
        "rollout.tensor_parallel_size": 1,
        "rollout.extra_args": VLLM_ARGS,
        "train.kind": "megatron",
        "train.data_parallel": 4,
        "train.pipeline_parallel": 1,
        "train.tensor_parallel": 1,
        "train.gradient_checkpointing": False,
        "publish.kind": "xccl",
        "lora.lora_rank": 16,
        "lora.lora_alpha": 16.0,
        "lora.target_modules": FUSED,
        "optimizer.lr": 3e-5,
        "optimizer.weight_decay": 0.003,
        "optimizer.lr_schedule": "constant",
        "algo.batch_size": 256,
    },
    "gsm8k_grpo_megatron_lora_moe": {
        "name": "gsm8k-grpo-megatron-lora-moe-trial0",
        "model": "Qwen/Qwen3-30B-A3B-Base",
        "steps": 10 * (7473 // 16),
        "rollout.kind": "vllm",
        "rollout.replicas": 1,
        "rollout.tensor_parallel_size": 2,
        "rollout.extra_args": VLLM_ARGS,
        "train.kind": "megatron",
        "train.data_parallel": 1,
        "train.pipeline_parallel": 6,
        "train.tensor_parallel": 1,
        "train.context_parallel": 1,
        "train.expert_parallel": 1,
        "train.expert_tensor_parallel": 1,
        "train.gradient_checkpointing": False,
        "publish.kind": "xccl",
        "lora.lora_rank": 32,
        "lora.lora_alpha": 32.0,
        "lora.target_modules": FUSED,
        "optimizer.lr": 3e-6,
        "optimizer.weight_decay": 0.003,
        "optimizer.lr_schedule": "cosine",
        "optimizer.warmup_steps": 4,
        "algo.batch_size": 16,
        "eval.every": 7473 // 16,
    },
}


SECTIONS_OF_RUN = ("name", "model", "dtype", "runs_dir", "train", "publish", "machine", "cluster")


def at(value: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        value = getattr(value, name)
    return value.model_dump() if hasattr(value, "model_dump") else value


def changed(name: str, *overrides: str) -> Any:
    return load_config(example(name), overrides)


def refusal(name: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(example(name), overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_value_of_the_page_arrives(name):
    config = load_config(example(name))
    (experiment,) = config.experiments()
    assert experiment.name == "lora-gsm8k"
    for key, value in {**SHARED, **OWN[name]}.items():
        section = key.partition(".")[0]
        of_run = section in SECTIONS_OF_RUN
        assert at(config if of_run else experiment, key) == value, key


def test_the_prompt_fills_in_the_question_and_asks_for_a_box():
    (experiment,) = load_config(example("gsm8k_grpo_lora")).experiments()
    assert experiment.task.prompt_template.format(question="1 + 1?") == (
        "1 + 1?\nPlease put your final answer within \\boxed{}."
    )


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_is_converted_loads_as_the_same_configuration(name, tmp_path):
    config = load_config(example(name))
    path = tmp_path / "ours.yaml"
    path.write_text(dump_set(config))
    assert "actor" not in yaml.safe_load(path.read_text())
    again = load_config(path)
    assert again == config
    assert again.experiments() == config.experiments()


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_key_is_printed_with_what_it_became_or_why_not(name):
    translation = read_config(example(name)).translation
    text = "\n".join(lines(translation, name))
    for key in translation.file.values:
        assert f"{key}: " in text, key
    assert all(fate.became or fate.why for fate in fates(translation))
    assert "actor.optimizer.lr_scheduler_type" in text
    assert "rollout.queue_size: null: rollouts in flight are bounded" in text


def test_a_file_is_known_by_its_shape_and_ours_is_not_taken_for_one(tmp_path):
    path = tmp_path / "anything.yaml"
    path.write_text(example("gsm8k_grpo_lora").read_text())
    assert read_config(path).translation is not None
    path.write_text("model: m/m\ntask: {kind: reasoning_gym, name: chain_sum}\n")
    assert read_config(path).translation is None


def test_overrides_in_areals_words_reach_what_refers_to_them():
    config = changed("gsm8k_grpo_lora", "actor.path=m/m", "gconfig.n_samples=8", "seed=7")
    assert (config.model, config.rollout.n_samples, config.seed) == ("m/m", 8, 7)
    config = changed("gsm8k_grpo_lora", "train_dataset.batch_size=64")
    assert (config.algo.batch_size, config.steps) == (64, 10 * (7473 // 64))


def test_steps_take_the_place_of_epochs():
    more = ["total_train_steps=5", "evaluator.freq_steps=2"]
    loaded = read_config(example("gsm8k_grpo_lora"), more)
    assert (loaded.config.steps, loaded.config.eval.every) == (5, 2)
    text = "\n".join(lines(loaded.translation, "x"))
    assert "  total_train_epochs: 10: total_train_steps takes its place" in text
    assert "total_train_steps: 5  ->  steps: 5" in text


def test_overrides_in_our_words_are_set_in_the_translation():
    config = changed(
        "gsm8k_grpo_lora", "steps=3", "rollout={kind: embedded}", "publish.kind=memory"
    )
    assert (config.steps, config.rollout.kind) == (3, "embedded")


def test_of_overrides_in_both_words_the_last_counts():
    def staleness(*overrides: str) -> int:
        config = changed("gsm8k_grpo_lora", "publish.kind=memory", *overrides)
        return config.rollout.max_head_offpolicyness

    section, key = "rollout={kind: embedded, max_head_offpolicyness: 3}", "max_head_offpolicyness"
    assert staleness(section) == 3
    assert staleness(section, f"rollout.{key}=0") == 0
    assert staleness(f"rollout.{key}=0", section) == 3
    config = changed("gsm8k_grpo_lora", "train={kind: fsdp}", "actor.backend=archon:d1")
    assert config.train.kind == "archon"


def test_what_only_areals_algorithm_has_is_left_out_for_another():
    loaded = read_config(example("gsm8k_grpo_lora"), ["algo.kind=rloo", "algo.kl_ctl=0.2"])
    algo = loaded.config.algo
    assert (algo.kind, algo.kl_ctl, algo.reward_scaling) == ("rloo", 0.2, 10.0)
    text = "\n".join(lines(loaded.translation, "x"))
    (unused,) = (line for line in text.splitlines() if "means nothing with the other" in line)
    assert "actor.eps_clip: 0.4" in unused and "actor.use_decoupled_loss: true" in unused
    assert "algo.eps_clip" not in text and "algo.rejection_sampling" not in text
    # what is asked for in our words is not left out
    refused = refusal("gsm8k_grpo_lora", "algo.kind=rloo", "algo.eps_clip=0.3")
    assert refused == (
        "algo.eps_clip: has no effect with kind: rloo, only with cispo, dapo, "
        "dr_grpo, grpo, gspo, gspo_token, reinforce_pp; remove it"
    )


ELSEWHERE = ["train_dataset.path=org/data", "valid_dataset.path=org/data"]
COPIED = [rule for rule in RULES if rule.how == "copied"]
OTHERS = {  # values that differ from the example's and are allowed
    "rollout.max_concurrent_rollouts": 7,
    "gconfig.n_samples": 6,
    "gconfig.max_new_tokens": 99,
    "gconfig.temperature": 0.5,
    "gconfig.stop": ["x"],
    "actor.dtype": "fp32",
    "actor.target_modules": [],
    "actor.weight_update_mode": "xccl",
    "actor.optimizer.lr_scheduler_type": "linear",
    "actor.rejection_sampling.lower": 0.1,
    "actor.rejection_sampling.metric": "kl_k2",
    "actor.rejection_sampling.level": "sequence",
    "actor.rejection_sampling.action": "clamp",
    "actor.rejection_sampling.agg": "max",
    "rollout.agent.turn_discount": 0.5,
    "cluster.fileroot": "/elsewhere",
    "scheduler.type": "ray",
    "actor.eps_clip": 0.3,
    "actor.eps_clip_higher": 0.3,
    "actor.kl_ctl": 0.25,
    "actor.reward_bias": 0.25,
    "train_dataset.batch_size": 8,
    "actor.optimizer.beta1": 0.8,
    "actor.optimizer.beta2": 0.99,
    "eval_gconfig.top_p": 0.9,
    "actor.fsdp.offload_params": True,
    "actor.megatron.ddp.use_distributed_optimizer": True,
}
FIXED = {"actor.use_lora", "actor.peft_type"}  # one value each
SAPO = ["actor.use_sapo_loss=true", "actor.use_decoupled_loss=false"]
BESIDE = {  # what a key needs to mean something
    "actor.ppo_n_minibatches": ["train_dataset.batch_size=9"],
    "actor.rejection_sampling.agg": ["actor.rejection_sampling.level=sequence"],
    "actor.sapo_tau_pos": SAPO,
    "actor.sapo_tau_neg": SAPO,
    "rollout.agent.turn_discount": ["env={kind: multi_turn}"],
}


@pytest.mark.parametrize("rule", COPIED, ids=lambda rule: rule.key)
def test_a_copied_key_reaches_the_key_that_the_table_names(rule):
    if rule.key in FIXED:
        pytest.skip("has one allowed value")
    if rule.key in ("actor.use_decoupled_loss", "actor.gradient_checkpointing"):
        value: Any = False
    elif rule.key == "actor.dynamic_sampling":
        value = True
    else:
        value = OTHERS.get(rule.key, "other/model" if rule.key == "actor.path" else 3)
    more = BESIDE.get(rule.key, [])
    name = "gsm8k_grpo_megatron_lora" if "megatron" in rule.key else "gsm8k_grpo_lora"
    config = changed(name, f"{rule.key}={json.dumps(value)}", *more)
    wanted = rule.convert(value) if rule.convert else value
    found = at(config, rule.ours[0])
    assert (list(found) if isinstance(wanted, list) else found) == wanted


def test_areals_own_defaults_count_where_the_file_is_silent(tmp_path):
    path = tmp_path / "short.yaml"
    path.write_text(
        "experiment_name: e\ntrial_name: t\n"
        "rollout: {backend: 'vllm:d2', use_lora: true}\n"
        "actor: {backend: 'fsdp:d2', path: m/m, use_lora: true, optimizer: {lr: 1.0e-4}}\n"
        "gconfig: {n_samples: 4}\n"
        "ref: {path: m/m}\n"
        "train_dataset: {path: openai/gsm8k, type: rl, batch_size: 8}\n"
    )
    loaded = read_config(path)
    config = loaded.config
    algo, lora = config.algo, config.lora
    assert (algo.kl_ctl, algo.eps_clip, algo.ppo_n_minibatches) == (0.1, 0.2, 4)
    assert (algo.use_kl_in_reward, algo.kl_estimator, algo.reward_clip) == (True, "k1", 20.0)
    assert (algo.use_decoupled_loss, algo.recompute_logprob) == (False, False)
    assert (algo.adv_norm, algo.reward_norm, config.optimizer.weight_decay) == (None, None, 0.01)
    assert (lora.lora_rank, lora.lora_alpha, lora.target_modules) == (32, 16, ("all-linear",))
    assert (config.dtype, config.seed, config.steps) == ("bfloat16", 1, 7473 // 8)
    assert (config.publish.kind, config.eval.every) == ("xccl", 0)
    assert config.rollout.max_concurrent == 8, "AReaL's consumer_batch_size"
    assert list(config.adapters) == ["default_lora"]
    text = "\n".join(lines(loaded.translation, "short.yaml"))
    assert "  actor.kl_ctl: 0.1  ->  algo.kl_ctl: 0.1" in text.partition("by AReaL's defaults")[2]


def test_older_files_say_allocation_mode_and_an_importance_cap(tmp_path):
    data = yaml.safe_load(example("gsm8k_grpo_lora").read_text())
    del data["rollout"]["backend"], data["actor"]["backend"], data["actor"]["rejection_sampling"]
    del data["ref"]["backend"]
    data["allocation_mode"] = "vllm:d2p1t1+d4p1t1"
    data["actor"]["behav_imp_weight_cap"] = 3.0
    data["scheduler"]["type"] = "local"
    path = tmp_path / "old.yaml"
    path.write_text(yaml.safe_dump(data))
    config = load_config(path)
    assert (config.rollout.kind, config.rollout.replicas) == ("vllm", 2)
    assert (config.train.kind, config.train.sizes.data) == ("fsdp", 4)
    assert config.algo.rejection_sampling.upper == 3.0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["actor.use_lora=false"],
            "rollout.use_lora: true contradicts actor.use_lora: false; else rollouts silently "
            "sample the base model: make them equal, such as rollout.use_lora: ${actor.use_lora}",
        ),
        (
            ["rollout.use_lora=false", "actor.use_lora=true"],
            "rollout.use_lora: false contradicts actor.use_lora: true",
        ),
        (["sglang.enable_lora=false"], "sglang.enable_lora: false contradicts actor.use_lora"),
        (
            ["sglang.max_lora_rank=8"],
            "sglang.max_lora_rank: 8 is below actor.lora_rank: 16, whose adapters the server would "
            "refuse; set it to ${actor.lora_rank}",
        ),
        (
            ["sglang.max_loaded_loras=3"],
            "sglang.max_loaded_loras: 3 has no room for the 4 versions of "
            "rollout.max_head_offpolicyness: 2; use 4 or more",
        ),
        (["actor.temperature=0.7"], "actor.temperature: 0.7 contradicts gconfig.temperature: 1.0"),
        (["actor.reward_norm.group_size=8"], "group_size: 8 contradicts gconfig.n_samples: 4"),
        (["rollout.consumer_batch_size=1"], "contradicts train_dataset.batch_size: 256"),
        (["ref.path=other/model"], 'ref.path: "other/model" contradicts actor.path'),
        (["tokenizer_path=other/model"], "tokenizer_path: "),
        (["sglang.model_path=other/model"], "sglang.model_path: "),
        (["sglang.dtype=float16"], "sglang.dtype: "),
        (
            ["actor.backend=fsdp:d8"],
            "cluster.n_gpus_per_node: 8 on 1 node are fewer than the 8 of actor.backend and 4 of "
            "rollout.backend",
        ),
        (["actor.backend=megatron:d4"], "actor.megatron.bridge_type: 'mbridge' (AReaL's default"),
        (["actor.backend=archon:d2t2"], "archon has no tensor parallel size, and 2 is asked for"),
        (["rollout.backend=vllm:d2p2"], "rollout.backend: vllm has no pipeline parallel size"),
        (["actor.backend=deepspeed:d4"], "actor.backend: 'deepspeed' is no engine of this side"),
        (["rollout.backend=fsdp:d4"], "rollout.backend: 'fsdp' is no engine of this side"),
        (["rollout.backend=null"], "rollout.backend: is required, such as sglang:d4"),
        (["allocation_mode=sglang:d4|fsdp:d4"], "puts trainer and servers on the same devices"),
        (["gconfig.greedy=true"], "gconfig.greedy: true cannot be done here; greedy samples"),
        (["gconfig.top_p=0.9"], "gconfig.top_p: 0.9 cannot be done here"),
        (["actor.use_sapo_loss=true"], "actor.use_sapo_loss: true contradicts actor.use_decoup"),
        (["actor.optimizer.type=sgd"], '"sgd" cannot be done here; AdamW with'),
        (["critic={path: x}"], 'critic.path: "x" is PPO with a critic, which is not built yet'),
        (["scheduler.type=slurm"], "scheduler.type: 'slurm' does not start runs here"),
        (["actor.lora_rnak=4"], "actor.lora_rnak: unknown key; did you mean 'lora_rank'?"),
        (["gconfig.nsamples=4"], "gconfig.nsamples: unknown key; did you mean 'n_samples'?"),
        (["sglang.tp_size=4"], "sglang.tp_size: follows from rollout.tensor_parallel_size here"),
        (["sglang.cuda_graph_bs=[1,2]"], "sglang.cuda_graph_bs: [1, 2] is not allowed; write one"),
        (["actor.optimizer.lr=high"], "optimizer.lr: 'high' is not allowed"),
        (["gconfig.max_tokens=many"], "gconfig.max_tokens: 'many' is not allowed; write a number"),
        (["train_dataset.batch_size=8000"], "is more than the 7473 rows of openai/gsm8k"),
        (ELSEWHERE, "task: train_dataset.path: 'org/data' is read and"),
    ],
)
def test_contradictions_name_field_value_and_fix(overrides, words):
    assert words in refusal("gsm8k_grpo_lora", *overrides)


def test_a_group_size_means_nothing_where_no_statistics_are_of_a_group():
    levels = [f"actor.reward_norm.{level}=batch" for level in ("mean_level", "std_level")]
    changed("gsm8k_grpo_lora", *levels, "actor.reward_norm.group_size=8")


def test_the_section_of_the_other_server_is_not_looked_at():
    config = changed("gsm8k_grpo_lora", "vllm.max_lora_rank=8", "vllm.model=other/model")
    assert config.rollout.kind == "sglang"


def test_a_larger_rank_of_the_server_is_room_for_adapters_to_come():
    assert changed("gsm8k_grpo_lora", "sglang.max_lora_rank=64").rollout.reserve_rank == 64


def test_data_that_only_areals_code_can_read_is_asked_for_and_can_be_given(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    task = f"task={{kind: jsonl, path: {tmp_path / 'rows.jsonl'}}}"
    own = [*ELSEWHERE, task]
    assert refusal("gsm8k_grpo_lora", *own).startswith("reward: train_dataset.path: 'org/data'")
    own += ["reward={kind: math_verify}"]
    assert refusal("gsm8k_grpo_lora", *own).startswith("steps: total_train_epochs: 10 of data")
    own += ["steps=5"]
    assert refusal("gsm8k_grpo_lora", *own).startswith("eval: evaluator.freq_epochs: 1 of data")
    own += ["eval.every=2"]
    config = changed("gsm8k_grpo_lora", *own)
    assert (config.task.kind, config.steps, config.eval.every) == ("jsonl", 5, 2)


def test_the_page_is_what_the_table_gives():
    assert page.PAGE.read_text() == page.page(page.kept()), "run `python -m lorelei.areal.page`"


def test_no_key_has_two_rules_and_every_section_rule_stands_last_in_name():
    keys = [rule.key for rule in RULES]
    assert len(keys) == len(set(keys))
    assert all("*" not in key.removesuffix(BELOW) for key in keys)


def test_examples_lie_beside_the_tests():
    assert {path.stem for path in Path("tests/areal").glob("*.yaml")} == set(EXAMPLES)
