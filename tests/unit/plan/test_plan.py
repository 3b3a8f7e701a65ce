"""The plan's numbers, against counts made by hand, by transformers and by peft."""

import io
import json
import sys

import pytest
from rich.console import Console

from lorelei.cli import main as cli
from lorelei.lora.targets import match_targets, module_shapes
from lorelei.plan.format import plan_table
from lorelei.plan.plan import plan
from lorelei.run_file import load_config
from lorelei.types import AdapterSpec

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
QWEN2_05B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
BIASED = {**SMOLLM2, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
MIXED = {**QWEN3_30B_A3B, "num_hidden_layers": 5, "mlp_only_layers": [1], "decoder_sparse_step": 2}


@pytest.fixture
def config_of(tmp_path):
    """A run on a model of which there is only a config.json."""

    def make(hf_config, *overrides, more=""):
        (tmp_path / "config.json").write_text(json.dumps(hf_config))
        path = tmp_path / "run.yaml"
        path.write_text(f"model: .\ntask: {{kind: reasoning_gym, name: chain_sum}}\n{more}")
        return load_config(path, overrides)

    return make


@pytest.mark.parametrize(
    ("hf_config", "published"),
    [
        (SMOLLM2, 134_515_008),
        (QWEN2_05B, 494_032_768),
        (QWEN3_06B, 596_049_920),
        (QWEN3_30B_A3B, 30_532_122_624),
    ],
)
def test_parameters_of_known_models_are_the_published_numbers(config_of, hf_config, published):
    assert plan(config_of(hf_config)).total_parameters == published


@pytest.mark.parametrize("hf_config", [BIASED, MIXED, {**QWEN2_05B, "tie_word_embeddings": False}])
def test_parameters_of_variants_are_those_transformers_builds(config_of, hf_config):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf_config))
    assert plan(config_of(hf_config)).total_parameters == sum(p.numel() for p in model.parameters())


def test_trained_parameters_of_smollm2_at_rank_16_are_the_known_number(config_of):
    (adapter,) = plan(config_of(SMOLLM2)).adapters
    # 30 layers of rank * (in + out) for q, k, v, o, gate, up, down
    by_hand = 30 * 16 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))
    assert adapter.parameters == by_hand == 4_884_480
    assert len(adapter.modules) == 30 * 7


def test_every_expert_gets_an_adapter_and_the_router_none(config_of):
    (adapter,) = plan(config_of(QWEN3_30B_A3B, "lora.lora_rank=8")).adapters
    attention = 2 * (2048 + 4096) + 2 * (2048 + 512)
    experts = 128 * 3 * (2048 + 768)
    assert adapter.parameters == 48 * 8 * (attention + experts) == 421_920_768
    assert "model.layers.47.mlp.experts.127.down_proj" in adapter.modules
    assert not any(name.endswith("mlp.gate") for name in adapter.modules)


def test_layers_without_experts_get_adapters_on_their_plain_mlp(config_of):
    (adapter,) = plan(config_of(MIXED, "lora.target_modules=gate_proj")).adapters
    sparse = {int(name.split(".")[2]) for name in adapter.modules if ".experts." in name}
    # every second layer, and of these not layer 1
    assert sparse == {3}
    assert len(adapter.modules) == 4 + 128


@pytest.mark.parametrize("hf_config", [SMOLLM2, QWEN2_05B, QWEN3_06B])
@pytest.mark.parametrize(
    ("targets", "excluded"),
    [
        ("all-linear", None),
        (["q_proj", "v_proj"], None),
        (["mlp.down_proj", "model.layers.1.self_attn.q_proj"], None),
        (["q_proj", "lm_head"], None),
        (["q_proj", "o_proj"], ["layers.0.self_attn.q_proj"]),
        (r"model\.layers\.[01]\..*(k|up)_proj", None),
        ("all-linear", r".*\.1\..*"),
    ],
)
def test_targets_and_trained_parameters_are_those_of_peft(config_of, hf_config, targets, excluded):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    hf_config = {**hf_config, "num_hidden_layers": 3}
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf_config))
    theirs = get_peft_model(
        base,
        LoraConfig(r=4, target_modules=targets, exclude_modules=excluded, task_type="CAUSAL_LM"),
        low_cpu_mem_usage=True,
    )
    trained = [(n, p) for n, p in theirs.named_parameters() if ".lora_" in n]
    names = {n.removeprefix("base_model.model.").split(".lora_")[0] for n, _ in trained}
    config = config_of(
        hf_config,
        "lora.lora_rank=4",
        f"lora.target_modules={json.dumps(targets)}",
        f"lora.exclude_modules={json.dumps(excluded or [])}",
    )
    (ours,) = plan(config).adapters
    assert set(ours.modules) == names
    assert ours.parameters == sum(p.numel() for _, p in trained)


def _refusal(hf_config, **targets):
    with pytest.raises(ValueError) as caught:
        match_targets(
            module_shapes(hf_config), AdapterSpec(rank=1, alpha=1.0, **targets), "SomeModel"
        )
    return str(caught.value)


def test_a_target_that_matches_nothing_names_the_nearest():
    assert _refusal(SMOLLM2, target_modules=("q_prj",)) == (
        "lora.target_modules: 'q_prj' matches no linear layer of SomeModel; did you mean 'q_proj'?"
    )
    assert "did you mean 'gate_proj'?" in _refusal(QWEN3_30B_A3B, target_modules=("gate",))
    assert "there are: down_proj, gate_proj" in _refusal(SMOLLM2, target_modules=("zzz",))
    assert "is not a regular expression" in _refusal(SMOLLM2, target_modules=("(q_proj",))


def test_an_exclusion_must_match_and_must_leave_something():
    assert "lora.exclude_modules: 'x_proj' matches no" in _refusal(
        SMOLLM2, exclude_modules=("x_proj",)
    )
    assert "leaves nothing" in _refusal(
        SMOLLM2, target_modules=("q_proj",), exclude_modules=("self_attn.q_proj",)
    )


def test_a_wrong_target_of_one_adapter_names_the_adapter(config_of):
    config = config_of(SMOLLM2, more="adapters: {a: {}, b: {lora: {target_modules: q_prj}}}")
    with pytest.raises(ValueError, match=r"^adapters\.b\.lora\.target_modules: 'q_prj'"):
        plan(config)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rollout.max_context=9000", "rollout.max_context: 9000 is more than the model's 8192"),
        ("rollout.max_new_tokens=8192", "rollout.max_new_tokens: 8192 .* leaves no room"),
        ("eval.max_new_tokens=8192", "leaves no room"),
        (
            "algo={kind: distill, teacher: absent}",
            "algo.teacher: there is no file .*absent/adapter_config.json",
        ),
        (
            "algo={kind: grpo, kl_ctl: 0.1, reference: 'absent:a@v3'}",
            "algo.reference: there is no file .*absent/run.json",
        ),
        ("lora.init_from=absent", "lora.init_from: there is no file .*adapter_config.json"),
        ("reward={kind: python, path: absent.py:f}", "reward.path: there is no file .*absent.py "),
    ],
)
def test_what_the_model_or_the_disk_cannot_give_is_refused(config_of, override, expected):
    with pytest.raises(ValueError, match=expected):
        plan(config_of(SMOLLM2, override))


def test_memory_is_that_of_the_phase_that_needs_most(config_of):
    made = plan(config_of(SMOLLM2))
    assert made.total_memory == max(sum(parts.values()) for parts in made.memory.values())
    assert made.to_json()["total_memory"] == made.total_memory


def test_the_plan_command_prints_json_and_a_table(config_of, tmp_path, monkeypatch, capsys):
    words = "{optimizer: {lr: 1e-7}, lora: {lora_rank: 1}}"
    config_of(SMOLLM2, more=f"adapters: {{sums: {{}}, words: {words}}}")
    for flags in (["--json"], []):
        monkeypatch.setattr(sys, "argv", ["lorelei", "plan", str(tmp_path / "run.yaml"), *flags])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 0
        out = capsys.readouterr().out
        if flags:
            found = json.loads(out)
            assert found["total_parameters"] == 134_515_008
            assert [a["parameters"] for a in found["adapters"]] == [4_884_480, 305_280]
        else:
            assert "134,515,008" in out and "4,884,480" in out
            assert "warning: adapter words: optimizer.lr" in out
            assert f"memory: {found['total_memory'] / 2**30:.2f} GiB, estimated" in out


def test_an_adapter_that_samples_nothing_has_rows_and_no_rewards(config_of, tmp_path):
    (tmp_path / "rows.jsonl").touch()
    rows = f"{{kind: jsonl, path: {tmp_path / 'rows.jsonl'}}}"
    more = f"adapters: {{sums: {{}}, taught: {{algo: {{kind: sft}}, task: {rows}}}}}"
    sums, taught = plan(config_of(SMOLLM2, more=more)).adapters
    assert (sums.reward, sums.sequences_per_step) == ("reasoning_gym", 4 * 8)
    assert (taught.reward, taught.algo, taught.sequences_per_step) == (None, "sft", 4)
    assert taught.parameters == sums.parameters
    made = plan(config_of(SMOLLM2, "algo={kind: sft}", f"task={rows}"))
    assert set(made.memory) == {"loading", "training", "saving"}
    assert made.memory["training"]["reward workers"] == 0
    table = Console(width=200, file=io.StringIO())
    table.print(plan_table(made))
    assert "rows" in table.file.getvalue() and "rollouts" not in table.file.getvalue()


@pytest.mark.parametrize(
    ("hf_config", "train", "expected"),
    [
        (QWEN2_05B, "tensor_parallel: 7", "tensor_parallel: 7 .* 2 key/value heads; allowed: 1, 2"),
        (QWEN2_05B, "pipeline_parallel: 5", "pipeline_parallel: 5 does not divide .* 24 layers"),
        (QWEN3_06B, "data_parallel: 2, expert_parallel: 2", "expert_parallel: 2, .* no experts"),
        (QWEN3_30B_A3B, "tensor_parallel: 2", "sequence_parallel: false with tensor_parallel 2"),
        (
            QWEN3_30B_A3B,
            "data_parallel: 3, expert_parallel: 3",
            "expert_parallel: 3 does not divide the model's 128 experts",
        ),
        (
            QWEN2_05B,
            "tensor_parallel: 2, context_parallel: 2",
            "context_parallel: 2 x tensor_parallel 2 does not divide .* 2 key/value heads",
        ),
        (BIASED, "", "no place for this model's attention_bias"),
    ],
)
def test_a_layout_that_megatron_cannot_give_the_model_is_refused(
    config_of, hf_config, train, expected
):
    config = config_of(hf_config, more=f"train: {{kind: megatron, {train}}}")
    with pytest.raises(ValueError, match=f"train.*{expected}"):
        plan(config)


def test_a_layout_that_fits_is_planned(config_of):
    layout = "data_parallel: 2, tensor_parallel: 4, pipeline_parallel: 2, expert_parallel: 8"
    more = f"train: {{kind: megatron, {layout}, sequence_parallel: true}}"
    config = config_of(QWEN3_30B_A3B, more=more)
    assert config.train.workers == 16
    assert plan(config).adapters[0].parameters > 0
