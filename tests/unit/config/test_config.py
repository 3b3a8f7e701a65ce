"""The configuration says what its file says, and the defaults say the rest."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorelei.config.errors import ConfigError
from lorelei.model.locate import resolve_model
from lorelei.process import physical_cores
from lorelei.run_file import dump_config, json_schema, load_config, to_plain, validate
from lorelei.types import AdapterSpec

SHORT = """
model: HuggingFaceTB/SmolLM2-135M-Instruct
lora: {use_lora: true, lora_rank: 16, lora_alpha: 32, target_modules: [all-linear], peft_type: lora}
train: {kind: archon}
rollout: {kind: embedded, n_samples: 8, max_new_tokens: 64, max_head_offpolicyness: 0}
task: {kind: reasoning_gym, name: chain_sum}
algo: {kind: grpo, batch_size: 4}
optimizer: {lr: 2.0e-4}
"""

TAUGHT = """
model: m/m
task: {kind: jsonl, path: rows.jsonl, answer_field: solution}
algo: {kind: sft, batch_size: 8}
optimizer: {lr: 1.0e-4}
eval: {every: 2, n_prompts: 16}
"""
# one adapter learns from rewards, another from answers
BOTH = (
    SHORT
    + """
reward: {kind: reasoning_gym}
adapters:
  sums:
  taught: {algo: {kind: sft}, task: {kind: parquet, path: rows.parquet}, eval: {n_prompts: 3}}
"""
)

TWO = (
    SHORT
    + """
adapters:
  sums:
  words:
    steps: 7
    seed: 3
    lora: {lora_rank: 4}
    task: {name: word_sorting}
    algo: {kind: rloo, batch_size: 2}
    rollout: {n_samples: 4, temperature: 0.7}
    eval: {n_prompts: 16}
"""
)


@pytest.fixture
def write(tmp_path):
    def to_file(text, name="short.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return to_file


def test_the_short_file_of_the_design_is_a_complete_run(write):
    config = load_config(write(SHORT))
    (experiment,) = config.experiments()
    assert (config.name, experiment.name, experiment.steps) == ("short", "default", 30)
    assert experiment.lora.spec() == AdapterSpec(rank=16, alpha=32.0)
    assert experiment.optimizer.lr == 2e-4
    assert experiment.reward.kind == "reasoning_gym"
    assert config.warnings() == []


def test_a_model_and_a_task_are_enough(write):
    path = write("{model: m/m, task: {kind: reasoning_gym, name: chain_sum}}")
    assert load_config(path).experiments() == load_config(write(SHORT)).experiments()


def test_an_adapter_without_overrides_is_the_defaults(write):
    alone = load_config(write(SHORT)).experiments()[0]
    sums = load_config(write(TWO)).experiments()[0]
    assert sums == alone.model_copy(update={"name": "sums"})


def test_overrides_of_an_adapter_replace_only_what_they_name(write):
    sums, words = load_config(write(TWO)).experiments()
    assert (words.name, words.steps, words.seed) == ("words", 7, 3)
    assert words.lora.lora_rank == 4 and words.lora.lora_alpha == sums.lora.lora_alpha
    assert words.task.name == "word_sorting"
    assert words.rollout.n_samples == 4 and words.rollout.max_new_tokens == 64
    assert words.algo.batch_size == 2 and words.eval_size == 16 and sums.eval_size == 128


def test_a_learning_rate_survives_a_change_of_algorithm_and_the_normalisation_follows_it(write):
    sums, words = load_config(write(TWO), ["optimizer.lr=3e-4"]).experiments()
    assert sums.optimizer.lr == words.optimizer.lr == 3e-4
    assert sums.algo.adv_norm is not None and words.algo.adv_norm is None


def test_of_the_defaults_an_adapters_algorithm_keeps_what_it_has_itself(write):
    more = ["algo.eps_clip=0.3", "algo.ppo_n_minibatches=2", "algo.kl_ctl=0.1"]
    sums, words = load_config(write(TWO), more).experiments()
    assert (sums.algo.eps_clip, sums.algo.ppo_n_minibatches, sums.algo.kl_ctl) == (0.3, 2, 0.1)
    assert (words.algo.kind, words.algo.ppo_n_minibatches, words.algo.kl_ctl) == ("rloo", 2, 0.1)


def test_options_of_one_problem_are_not_handed_to_another(write):
    config = load_config(write(TWO), ["task.config={min_terms: 2}"])
    sums, words = config.experiments()
    assert sums.task.config == {"min_terms": 2} and words.task.config == {}


def test_a_task_of_another_kind_starts_afresh(write, tmp_path):
    override = "adapters.words.task={kind: jsonl, path: rows.jsonl}"
    config = load_config(
        write(TWO), ["task.size=5", override, "adapters.words.reward={kind: math_verify}"]
    )
    assert config.experiments()[1].task.kind == "jsonl"


def test_every_adapter_may_bring_its_own_task(write):
    text = "model: m/m\nadapters: {a: {task: {kind: reasoning_gym, name: chain_sum}}}"
    assert load_config(write(text)).experiments()[0].task.name == "chain_sum"


def test_groups_in_flight_follow_from_staleness_and_batch(write):
    (e,) = load_config(write(SHORT), ["rollout.max_head_offpolicyness=2"]).experiments()
    assert e.max_concurrent == (2 + 1) * 4
    (e,) = load_config(write(SHORT), ["rollout.max_concurrent=3"]).experiments()
    assert e.max_concurrent == 3


@pytest.mark.parametrize("written", ["1e-4", "1E-4", "1.e-4", "0.1e-3", "0.0001", "+1e-4"])
def test_numbers_are_numbers_however_they_are_written(write, written):
    assert load_config(write(SHORT), [f"optimizer.lr={written}"]).optimizer.lr == 1e-4
    overridden = load_config(write(SHORT), [f"task.config={{x: {written}}}"])
    assert overridden.task.config == {"x": 1e-4}


def test_overrides_reach_new_sections_lists_and_adapters(write):
    config = load_config(
        write(TWO),
        [
            *("lora.target_modules=[q_proj, v_proj]", "checkpoint.keep=5"),
            "adapters.sums.optimizer.lr=1e-3",
        ],
    )
    assert config.lora.target_modules == ("q_proj", "v_proj")
    assert config.checkpoint.keep == 5
    assert [e.optimizer.lr for e in config.experiments()] == [1e-3, 2e-4]


def test_supervised_fine_tuning_needs_rows_and_no_reward(write):
    config = load_config(write(TAUGHT))
    (experiment,) = config.experiments()
    assert (experiment.algo.kind, experiment.algo.batch_size) == ("sft", 8)
    assert (experiment.samples, experiment.reward) == (False, None)
    assert (experiment.task.answer_field, experiment.eval_size) == ("solution", 16)
    assert experiment.optimizer.lr == 1e-4
    # what belongs to the engine is for whoever samples from the adapter
    assert load_config(write(TAUGHT), ["rollout.max_running=4"]).rollout.max_running == 4


def test_an_adapter_may_be_taught_beside_one_that_is_rewarded(write):
    sums, taught = load_config(write(BOTH)).experiments()
    assert (sums.samples, sums.reward.kind, sums.algo.kind) == (True, "reasoning_gym", "grpo")
    assert (taught.samples, taught.reward, taught.algo.kind) == (False, None, "sft")
    assert taught.rollout == sums.rollout and taught.eval.n_prompts == 3


def test_what_an_adapter_does_not_use_is_not_written_into_run_json(write):
    plain = to_plain(load_config(write(TAUGHT)))
    assert "reward" not in plain and "env" not in plain
    assert "n_samples" not in plain["rollout"] and "temperature" not in plain["eval"]
    plain = to_plain(load_config(write(BOTH)))
    assert plain["adapters"]["sums"]["reward"]["kind"] == "reasoning_gym"
    assert "reward" not in plain["adapters"]["taught"]
    fields = {"kind", "batch_size", "loss_on", "weight_field"}
    assert set(plain["adapters"]["taught"]["algo"]) == fields


@pytest.mark.parametrize("text", [SHORT, TWO, TAUGHT, BOTH])
def test_a_dumped_configuration_loads_as_the_same_run(write, text):
    more = [] if text == TAUGHT else ["task.config={min_terms: 2}"]
    config = load_config(write(text), [*more, "rollout.max_running=5"])
    again = load_config(write(dump_config(config), "other.yaml"))
    assert again.experiments() == config.experiments()
    assert again.model_copy(update={"adapters": config.adapters}) == config
    assert to_plain(again) == to_plain(config)
    assert validate(json.loads(json.dumps(to_plain(config)))).experiments() == config.experiments()


def test_relative_paths_start_at_the_file_and_those_of_overrides_at_the_working_directory(
    write, tmp_path, monkeypatch
):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    text = """
model: ./weights
task: {kind: jsonl, path: data/rows.jsonl}
reward: {kind: python, path: rewards.py:score}
adapters: {a: {lora: {init_from: warm}}, b: {task: {kind: hf, path: openai/gsm8k}}}
"""
    config = load_config(write(text), ["adapters.b.lora.init_from=warm"])
    a, b = config.experiments()
    assert config.model == str(tmp_path / "weights")
    assert a.task.path == str(tmp_path / "data/rows.jsonl")
    assert a.reward.path == f"{tmp_path / 'rewards.py'}:score"
    assert a.lora.init_from == str(tmp_path / "warm")
    assert b.task.path == "openai/gsm8k"
    assert b.lora.init_from == str(tmp_path / "elsewhere" / "warm")


def test_a_rate_for_full_fine_tuning_is_warned_of(write):
    (warning,) = load_config(write(SHORT), ["optimizer.lr=1e-6"]).warnings()
    assert "optimizer.lr: 1e-06" in warning


def test_in_full_fine_tuning_a_rate_for_lora_is_warned_of(write):
    full = "lora.use_lora=false"
    assert load_config(write(SHORT), [full, "optimizer.lr=1e-6"]).warnings() == []
    (warning,) = load_config(write(SHORT), [full, "optimizer.lr=2e-4"]).warnings()
    assert "optimizer.lr: 0.0002 is a rate for LoRA" in warning


def test_the_schema_describes_every_field():
    schema = json_schema()
    sections = [schema, *schema["$defs"].values()]
    bare = [
        f"{section['title']}.{name}"
        for section in sections
        for name, field in section.get("properties", {}).items()
        if "description" not in field
    ]
    assert bare == []
    assert schema["additionalProperties"] is False


def test_a_configuration_cannot_be_changed(write):
    config = load_config(write(SHORT))
    with pytest.raises(ValueError, match="frozen"):
        config.algo.batch_size = 1


def _model(folder: Path, *files: str) -> Path:
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).write_text("{}")
    return folder


def test_a_model_is_found_in_a_folder_then_in_our_cache_then_in_the_hugging_face_cache(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("LORELEI_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    with pytest.raises(ConfigError, match=r"'org/name'.*make model"):
        resolve_model("org/name")
    repo = tmp_path / "hf" / "models--org--name"
    in_hub_cache = _model(repo / "snapshots" / ("0" * 40), "config.json")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    assert resolve_model("org/name", weights=False) == in_hub_cache
    in_our_cache = _model(tmp_path / "xdg/lorelei/models/org--name", "config.json")
    assert resolve_model("org/name", weights=False) == in_our_cache
    with pytest.raises(ConfigError, match=r"no \*\.safetensors"):
        resolve_model("org/name")
    named = _model(tmp_path / "c/models/org--name", "config.json", "model.safetensors")
    monkeypatch.setenv("LORELEI_CACHE", str(tmp_path / "c"))
    assert resolve_model("org/name") == named
    assert resolve_model(str(named)) == named


def test_physical_cores_are_at_most_the_cpus_we_may_use():
    assert 1 <= physical_cores() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    "code",
    [
        "import lorelei, lorelei.types, lorelei.run_file, lorelei.model.locate",
        "import lorelei.lora.targets, lorelei.plan.plan, lorelei.plan.format",
        "import lorelei.store.identity, lorelei.store.check, lorelei.store.index",
        "from lorelei.cli.main import app; app(['--help'], standalone_mode=False)",
        "from lorelei.cli.main import app; app(['schema'], standalone_mode=False)",
    ],
)
def test_nothing_heavy_is_imported_before_a_command_needs_it(code):
    check = "import sys; print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{check}"], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
