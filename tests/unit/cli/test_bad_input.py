"""What a user gets wrong is one line: the dotted field, its value, what is allowed, the fix."""

import json
import subprocess
import sys

import pytest

from lorelei.cli import main as cli
from lorelei.config.errors import ConfigError
from lorelei.run_file import load_config

TASK = "task: {kind: reasoning_gym, name: chain_sum}\n"
GOOD = f"model: org/name\n{TASK}"
ROWS = "model: org/name\ntask: {kind: jsonl, path: rows.jsonl}\n"
SFT = ROWS + "algo: {kind: sft}\n"

BAD = [
    # what the file is
    ("", "model: is required"),
    ("- a list", "write key: value lines"),
    ("model: [", "line 1"),
    (GOOD + "model: other/name", "'model' is given twice"),
    (GOOD + "adapters: {a: {}, a: {}}", "'a' is given twice"),
    # unknown keys, with the nearest known one
    (TASK, "model: is required"),
    (GOOD + "algorithm: {}", "algorithm: unknown key; did you mean 'algo'?"),
    (GOOD + "algo: {learning: 1}", "algo.learning: unknown key; allowed: adv_norm, batch_size"),
    (GOOD + "lora: {rank: 8}", "lora.rank: unknown key; did you mean 'lora_rank'?"),
    (
        "model: m\ntask: {kind: jsonl, path: x, answr_field: y}",
        "task.answr_field: unknown key; did you mean 'answer_field'?",
    ),
    (GOOD + "adapters: {a: {algoo: {}}}", "adapters.a.algoo: unknown key; did you mean 'algo'?"),
    (GOOD + "adapters: {a: {algo: {lrr: 1}}}", "adapters.a.algo.lrr: unknown key; did you mean"),
    # kinds
    ("model: m\ntask: {name: chain_sum}", "task.kind: is required; allowed: reasoning_gym, jsonl"),
    ("model: m\ntask: {kind: json, path: x}", "task.kind: 'json' is not allowed; did you mean"),
    (
        GOOD + "reward: {kind: 3}",
        "reward.kind: 3 is not allowed; allowed: env, math_verify, python",
    ),
    (
        GOOD + "train: {kind: megaton}",
        "train.kind: 'megaton' is not allowed; did you mean 'megatron'",
    ),
    (
        GOOD + "train: {kind: megatron, workers: 2}",
        "train.workers: unknown key",
    ),
    (
        GOOD + "train: {kind: megatron, sequence_parallel: true}",
        "train.sequence_parallel: true needs tensor_parallel above 1",
    ),
    (
        GOOD + "train: {kind: megatron, tensor_parallel: 3, expert_parallel: 2}",
        "train.expert_parallel: 2 x expert_tensor_parallel 1 does not divide the 3 processes",
    ),
    (GOOD + "reward: {kind: reasoning_gym, memory_gib: 0}", "reward.memory_gib: 0 is not allowed"),
    (GOOD + "reward: {kind: reasoning_gym, start_timeout: -1}", "reward.start_timeout: -1 is not"),
    (GOOD + "reward: {kind: reasoning_gym, env: [A]}", "reward.env: unknown key"),
    (
        ROWS + "reward: {kind: python, path: r.py:f, env: [A=1]}",
        "reward.env: ['A=1'] is not allowed; write the names of variables",
    ),
    (
        GOOD + "algo: {adv_norm: null, drop_zero_variance_groups: true}\nrollout: {n_samples: 1}",
        "algo.drop_zero_variance_groups: true drops every group of rollout.n_samples: 1",
    ),
    (GOOD + "rollout: {kind: vlm}", "rollout.kind: 'vlm' is not allowed; did you mean 'vllm'?"),
    (GOOD + "lora: {peft_type: dora}", "lora.peft_type: 'dora' is not allowed; allowed: 'lora'"),
    (GOOD + "dtype: fp32", "dtype: 'fp32' is not allowed; allowed: 'float32', 'bfloat16'"),
    # types and ranges
    ("model: m\ntask: chain_sum", "task: 'chain_sum' is not allowed; write a mapping"),
    (GOOD + "algo: 3", "algo: 3 is not allowed; write a mapping"),
    (GOOD + "steps: many", "steps: 'many' is not allowed; it must be a valid integer"),
    (GOOD + "steps: 0", "steps: 0 is not allowed; it must be greater than or equal to 1"),
    (GOOD + "lora: {lora_rank: 0}", "lora.lora_rank: 0 is not allowed; it must be greater than"),
    (GOOD + "lora: {lora_rank: 513}", "lora.lora_rank: 513 is not allowed; it must be less than"),
    (
        GOOD + "lora: {target_modules: []}",
        "lora.target_modules: [] is not allowed; it needs at least 1",
    ),
    (GOOD + "optimizer: {lr: 0}", "optimizer.lr: 0 is not allowed; it must be greater than 0$"),
    (GOOD + "optimizer: {lr: .nan}", "optimizer.lr: nan is not allowed; it must be"),
    # keys of the optimizer in `algo`, as older files have them
    (GOOD + "algo: {lr: 0}", "optimizer.lr: 0 is not allowed; it must be greater than 0$"),
    (GOOD + "adapters: {a: {algo: {beta1: 1}}}", "adapters.a.optimizer.beta1: 1 is not allowed"),
    (
        GOOD + "algo: {lr: 1.0e-4}\noptimizer: {lr: 1.0e-4}",
        "algo.lr: is optimizer.lr too; give one of them$",
    ),
    (
        GOOD + "adapters: {a: {algo: {eps: 1.0e-4}, optimizer: {eps: 1.0e-4}}}",
        "adapters.a.algo.eps: is optimizer.eps too; give one of them$",
    ),
    (GOOD + "checkpoint: {keep: 1}", "checkpoint.keep: 1 is not allowed; it must be greater"),
    (GOOD + "name: ../up", "name: '../up' is not allowed; a name has 1 to 64 characters"),
    (GOOD + "adapters: {Math Two: {}}", "adapters.Math Two: 'Math Two' is not allowed; a name"),
    (GOOD + "adapters: {a: {steps: 0}}", "adapters.a.steps: 0 is not allowed"),
    # what cannot work
    (
        GOOD + "lora: {use_lora: false}\nadapters: {a: {}, b: {}}",
        "lora.use_lora: false with 2 adapters; full fine-tuning trains one model: leave one",
    ),
    (
        GOOD + "adapters: {a: {}, b: {lora: {use_lora: false}}}",
        "lora.use_lora: false with 2 adapters; full fine-tuning trains one model: leave one",
    ),
    (
        GOOD + "lora: {use_lora: false}\ndtype: bfloat16",
        "dtype: 'bfloat16' is not allowed with lora.use_lora: false; use float32",
    ),
    (
        GOOD + "lora: {use_lora: false, init_from: x}",
        "is an adapter, and use_lora: false trains none; remove it",
    ),
    (GOOD + "rollout: {temperature: 0}", "rollout.temperature: 0 is not allowed; greedy samples"),
    (GOOD + "rollout: {top_k: 5}", "rollout.top_k: is refused in training"),
    (GOOD + "adapters: {a: {rollout: {top_p: 0.9}}}", "adapters.a.rollout.top_p: is refused"),
    (GOOD + "rollout: {stop_strings: ['']}", "rollout.stop_strings: [''] is not allowed"),
    (
        GOOD + "rollout: {max_new_tokens: 64, max_context: 64}",
        "rollout.max_new_tokens: 64 leaves no room for a prompt in max_context: 64",
    ),
    (GOOD + "rollout: {n_samples: 1}", "rollout.n_samples: 1 gives algo.kind 'grpo' no statistics"),
    (
        GOOD + "algo: {kind: rloo}\nrollout: {n_samples: 1}",
        "rollout.n_samples: 1 gives algo.kind 'rloo' no statistics of a group; use 2 or more",
    ),
    (
        GOOD + "adapters: {a: {rollout: {n_samples: 1}}}",
        "adapters.a.rollout.n_samples: 1 gives algo.kind 'grpo' no statistics",
    ),
    (
        GOOD + "algo: {batch_size: 1, adv_norm: {mean_level: batch, std_level: none}}\n"
        "rollout: {n_samples: 1}",
        "algo.batch_size: 1 with rollout.n_samples: 1 gives no statistics of a batch",
    ),
    (
        GOOD + "algo: {batch_size: 4, ppo_n_minibatches: 3}",
        "algo.ppo_n_minibatches: 3 does not divide batch_size: 4",
    ),
    (GOOD + "algo: {recompute_logprob: false}", "algo.recompute_logprob: false leaves use_decoup"),
    (GOOD + "algo: {rejection_sampling: {}}", "algo.rejection_sampling.upper: give upper, lower"),
    (
        GOOD + "algo: {kind: dapo, overlong_penalty: {buffer: 99}}\nrollout: {max_new_tokens: 64}",
        "algo.overlong_penalty.buffer: 99 is more than rollout.max_new_tokens: 64, so that every",
    ),
    (
        GOOD + "algo: {turn_discount: 0.5}",
        "algo.turn_discount: 0.5 does nothing with env.kind: single_turn, whose answers have one",
    ),
    (GOOD + "algo: {c_clip: 1.1}", "algo.c_clip: 1.1 is within the clip, which ends at 1.2; raise"),
    (
        GOOD + "algo: {rejection_sampling: {upper: 2, agg: sum}}",
        "algo.rejection_sampling.agg: sum does nothing with level: token; remove it",
    ),
    (
        GOOD + "algo: {rejection_sampling: {upper: 1, lower: 2}}",
        "algo.rejection_sampling.lower: 2.0 is not below upper: 1.0",
    ),
    (
        GOOD + "algo: {kind: rloo, rejection_sampling: {upper: 2}}",
        "algo.rejection_sampling: has no effect with kind: rloo, only with cispo, dapo, dr_grpo,",
    ),
    (
        GOOD + "algo: {kind: rloo, eps_clip: 0.3}",
        "algo.eps_clip: has no effect with kind: rloo, only with cispo, dapo, dr_grpo,",
    ),
    (
        GOOD + "adapters: {a: {algo: {kind: rloo, use_decoupled_loss: true}}}",
        "adapters.a.algo.use_decoupled_loss: has no effect with kind: rloo, only with cispo, dapo",
    ),
    (GOOD + "algo: {kind: grop}", "algo.kind: 'grop' is not allowed; did you mean 'grpo'?"),
    (GOOD + "algo: {kind: 3}", "algo.kind: 3 is not allowed; allowed: cispo, dapo, "),
    # supervised fine-tuning samples nothing
    (SFT + "reward: {kind: math_verify}", "reward: has no effect with algo.kind: sft, which"),
    (SFT + "env: {kind: single_turn}", "env: has no effect with algo.kind: sft, which samples"),
    (SFT + "rollout: {n_samples: 4}", "rollout.n_samples: has no effect with algo.kind: sft"),
    (SFT + "eval: {temperature: 1.0}", "eval.temperature: has no effect with algo.kind: sft"),
    (
        ROWS + "adapters: {a: {algo: {kind: sft}, rollout: {max_new_tokens: 4}}}",
        "adapters.a.rollout.max_new_tokens: has no effect with algo.kind: sft",
    ),
    (
        ROWS + "rollout: {n_samples: 2}\nadapters: {a: {algo: {kind: sft}}}",
        "rollout.n_samples: has no effect with algo.kind: sft",
    ),
    (GOOD + "algo: {kind: sft}", "task.kind: 'reasoning_gym' makes problems to be scored, without"),
    (SFT + "adapters: {a: {algo: {kl_ctl: 0.1}}}", "adapters.a.algo.kl_ctl: has no effect with"),
    # engine-wide fields within an adapter
    (GOOD + "adapters: {a: {train: {}}}", "adapters.a.train: belongs to the whole run"),
    (
        GOOD + "adapters: {a: {rollout: {max_running: 3}}}",
        "adapters.a.rollout.max_running: belongs to the whole run, not to one adapter; move it",
    ),
    (GOOD + "adapters: {a: {rollout: {kind: vllm}}}", "adapters.a.rollout.kind: belongs to the"),
    # tasks and rewards
    ("model: m", "task: is required, such as {kind: reasoning_gym"),
    ("model: m\nadapters: {a: {steps: 1}}", "adapters.a.task: is required"),
    ("model: m\ntask: {kind: reasoning_gym}", "task.name: give exactly one of name and mixture"),
    ("model: m\ntask: {kind: jsonl}", "task.path: is required"),
    (
        "model: m\ntask: {kind: reasoning_gym, mixture: [{name: a, weight: 0}]}",
        "task.mixture.0.weight: 0 is not allowed; it must be greater than 0$",
    ),
    (ROWS, "reward: is required for task.kind 'jsonl'; use {kind: math_verify}"),
    (ROWS + "reward: {kind: reasoning_gym}", "reward.kind: 'reasoning_gym' cannot score task.kind"),
    (ROWS + "reward: {kind: python, path: rewards.py}", "write FILE.py:FUNCTION, such as"),
    (
        "model: m\ntask: {kind: reasoning_gym, name: a, prompt_template: hello}",
        "task.prompt_template: 'hello' is not allowed; it must name a field",
    ),
    (
        "model: m\ntask: {kind: reasoning_gym, name: a, prompt_template: '{a.__class__}'}",
        "'{a.__class__}' is not a field name",
    ),
    (
        "model: m\ntask: {kind: reasoning_gym, name: a, prompt_template: '{\"x\": {question}}'}",
        "task.prompt_template:",
    ),
    (
        "model: m\ntask: {kind: reasoning_gym, name: a, eval_size: 9}",
        "eval.n_prompts: 128 is more than task.eval_size: 9; lower it or raise task.eval_size",
    ),
]


@pytest.mark.parametrize(("text", "expected"), BAD)
def test_a_bad_configuration_is_one_line_that_names_the_field_and_the_fix(tmp_path, text, expected):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 400
    # '$' stands for the end of the line
    assert expected in f"{line}$"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps", "override 'steps': write key=value"),
        ("=3", "override '=3': write key=value"),
        ("optimizer..lr=3", "override 'optimizer..lr=3': write key=value"),
        ("steps.x=3", "steps.x: steps is 5, which has no keys to set"),
        ("optimizer.lr=[1", "override 'optimizer.lr=[1', line 1:"),
        ("optimizer.lr=fast", "optimizer.lr: 'fast' is not allowed; it must be a valid number"),
        ("algo.lr=fast", "optimizer.lr: 'fast' is not allowed; it must be a valid number"),
        ("nam=x", "nam: unknown key; did you mean 'name'?"),
    ],
)
def test_a_bad_override_is_one_line(tmp_path, override, expected):
    path = tmp_path / "run.yaml"
    path.write_text(GOOD + "steps: 5")
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_several_errors_are_counted_behind_the_first(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(GOOD + "steps: 0\nlora: {lora_rank: 0}")
    with pytest.raises(ConfigError, match=r"^steps: 0 .* \(and 1 more\)$"):
        load_config(path)


def test_a_file_name_that_is_no_run_name_is_refused(tmp_path):
    path = tmp_path / "My Run.yaml"
    path.write_text(GOOD)
    with pytest.raises(ConfigError, match=r"^name: 'My Run' is not allowed"):
        load_config(path)


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        load_config(path)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["plan", "absent.yaml"], "absent.yaml: cannot be read: No such file or directory"),
        (["plan", "."], ".: cannot be read: Is a directory"),
        (["plan", "run.yaml"], "/absent'; write a folder or a hub id"),
        (["train", "run.yaml", "steps=0"], "steps: 0 is not allowed"),
        (["resume", "absent"], "run: there is no run folder 'absent'"),
        (["check", "absent"], "run: there is no run folder 'absent'"),
        (["runs", "absent"], "runs: there is no folder 'absent'"),
    ],
)
def test_a_command_says_it_in_one_line_and_leaves_with_2(
    tmp_path, monkeypatch, capsys, arguments, expected
):
    (tmp_path / "run.yaml").write_text(f"model: ./absent\n{TASK}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lorelei", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    error = capsys.readouterr().err
    assert left.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1
    assert expected in error


def test_the_traceback_of_an_error_can_be_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("LORELEI_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["lorelei", "plan", str(tmp_path / "absent.yaml")])
    with pytest.raises(ConfigError):
        cli.main()


def test_the_command_line_as_users_start_it(tmp_path):
    (tmp_path / "run.yaml").write_text(GOOD)
    command = [sys.executable, "-m", "lorelei", "plan", str(tmp_path / "run.yaml"), "algo.lrr=1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: algo.lrr: unknown key; did you mean 'lr'?\n"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no JSON object"),
        (json.dumps({"architectures": ["GPT2LMHeadModel"]}), "'GPT2LMHeadModel' is not supported"),
        (json.dumps({"model_type": "llama"}), "has no 'num_attention_heads'"),
    ],
)
def test_a_bad_model_configuration_is_one_line(tmp_path, monkeypatch, capsys, content, expected):
    (tmp_path / "config.json").write_text(content)
    (tmp_path / "run.yaml").write_text(f"model: .\n{TASK}")
    monkeypatch.setattr(sys, "argv", ["lorelei", "plan", str(tmp_path / "run.yaml")])
    with pytest.raises(SystemExit) as left:
        cli.main()
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.count("\n") == 1
    assert expected in error
