"""Models that our own decoder does not build: outlines, plans, and what is refused of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorelei.config.errors import ConfigError
from lorelei.config.run import RunConfig
from lorelei.launch.servers import projections
from lorelei.model.config import UnsupportedModel
from lorelei.model.load import read_config
from lorelei.plan.model_info import decoder_info
from lorelei.plan.plan import plan
from lorelei.run_file import load_config
from lorelei.train.fsdp.model_info import hosted_info
from tests.tiny_models import FAMILIES, FOREIGN, tiny_config
from tests.tiny_runs import write_rows, write_run

HOSTED = {"kind": "fsdp", "data_parallel": 2}


def run_of(folder: Path, family: str, rollout: str, train: Any = HOSTED, **model: Any) -> RunConfig:
    """On a model of which there is only a config.json."""
    tiny_config(family, **model).save_pretrained(folder / "model")
    (folder / "rewards.py").write_text("")
    write_rows(folder)
    raw = json.loads((folder / "model/config.json").read_text())
    name = {"gemma2": "Gemma2", "phi": "Phi", "mistral": "Mistral"}[family]
    raw["architectures"] = [f"{name}ForCausalLM"]
    (folder / "model/config.json").write_text(json.dumps(raw))
    sampler = {"kind": rollout, "n_samples": 2, "max_new_tokens": 8}
    path = write_run(folder, "run", train=train, rollout=sampler, eval={"every": 0})
    return load_config(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_our_families_has_the_same_outline_from_transformers_modules(
    family: str, tmp_path: Path
) -> None:
    tiny_config(family, architectures=None).save_pretrained(tmp_path)
    ours, theirs = decoder_info(read_config(tmp_path)), hosted_info(tmp_path, 2)
    for field in ("hidden", "intermediate", "layers", "heads", "kv_heads", "head_dim", "vocab"):
        assert getattr(theirs.sizes, field) == getattr(ours.sizes, field), field
    assert theirs.sizes.max_positions == ours.sizes.max_positions
    assert theirs.sizes.tied_embeddings == ours.sizes.tied_embeddings
    assert theirs.sizes.moe == ours.sizes.moe
    assert list(theirs.linears.items()) == list(ours.linears.items())
    assert theirs.parameters == ours.parameters


@pytest.mark.parametrize("family", FOREIGN)
def test_a_foreign_model_is_planned_as_transformers_and_peft_build_it(
    family: str, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    made = plan(run_of(tmp_path, family, "vllm"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(family))
    assert made.total_parameters == sum(p.numel() for p in model.parameters())
    theirs = get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear"), low_cpu_mem_usage=True
    )
    trained = sum(p.numel() for n, p in theirs.named_parameters() if ".lora_" in n)
    assert made.adapters[0].parameters == trained
    assert [group.role for group in made.processes] == ["controller", "fsdp rank", "vllm server"]


def test_a_server_gets_the_names_of_the_layers_that_the_architecture_has(tmp_path: Path) -> None:
    config = run_of(tmp_path, "phi", "vllm")
    found = projections(config, hosted_info(tmp_path / "model"))
    assert found == ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")


@pytest.mark.parametrize(
    ("train", "rollout"),
    [
        ({"kind": "archon"}, "vllm"),
        ({"kind": "megatron", "data_parallel": 2}, "vllm"),
        (HOSTED, "embedded"),
    ],
)
def test_engines_that_do_not_build_a_model_refuse_it_and_name_those_that_do(
    train: Any, rollout: str, tmp_path: Path
) -> None:
    fix = "use train.kind: fsdp with rollout.kind: vllm or sglang"
    with pytest.raises(ValueError, match=rf"^model: architecture 'MistralForCausalLM'.*{fix}$"):
        plan(run_of(tmp_path, "mistral", rollout, train))


@pytest.mark.parametrize(
    ("family", "changed", "rollout", "expected"),
    [
        ("mistral", {}, "sglang", "rollout.max_context: 512 tokens .* window of 6 .* to 6, or use"),
        ("gemma2", {}, "sglang", "model: SGLang .* attn_logit_softcapping 3 of Gemma2ForCausalLM"),
        (
            "phi",
            {},
            "sglang",
            "target_modules: dense, fc1, fc2 of PhiForCausalLM cannot be",
        ),
        ("mistral", {"head_dim": 24}, "vllm", "rollout.kind: vllm on a CPU crashes .* head_dim 24"),
        ("phi", {"quantization_config": {"quant_method": "gptq"}}, "vllm", "quantised"),
    ],
)
def test_what_a_server_would_do_wrong_with_a_model_is_refused_in_the_plan(
    family: str, changed: dict[str, Any], rollout: str, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=expected):
        plan(run_of(tmp_path, family, rollout, **changed))


def test_a_window_that_no_sequence_leaves_is_no_reason_to_refuse(tmp_path: Path) -> None:
    config = run_of(tmp_path, "mistral", "sglang", sliding_window=64)
    with pytest.raises(ConfigError, match="lower it to 64"):
        plan(config)
    rollout = config.rollout.model_copy(update={"max_context": 64})
    assert plan(config.model_copy(update={"rollout": rollout})).adapters


@pytest.mark.parametrize(
    ("raw", "rollout", "expected"),
    [
        (
            {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
            "vllm",
            "GPT2LMHeadModel has no torch.nn.Linear in its blocks",
        ),
        (
            {"model_type": "mamba", "architectures": ["MambaForCausalLM"]},
            "vllm",
            "layers of mamba of mamba would mix packed sequences",
        ),
        (
            {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]},
            "vllm",
            "gemma3 is not of text alone",
        ),
        (
            {"model_type": "dbrx", "architectures": ["DbrxForCausalLM"]},
            "vllm",
            "transformers cannot build the model of .*rope_theta",
        ),
        (
            {"model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"]},
            "sglang",
            "SmolLM3ForCausalLM is none of SGLang's own models",
        ),
        (
            {"model_type": "cohere2_moe", "architectures": ["Cohere2MoeForCausalLM"]},
            "vllm",
            "Cohere2MoeForCausalLM cannot have adapters in vLLM",
        ),
    ],
)
def test_architectures_that_cannot_be_adapted_are_refused_in_the_plan(
    raw: dict[str, Any], rollout: str, expected: str, tmp_path: Path
) -> None:
    config = run_of(tmp_path, "mistral", rollout)
    (tmp_path / "model/config.json").write_text(json.dumps(raw))
    with pytest.raises((UnsupportedModel, ConfigError), match=f"^model: .*{expected}"):
        plan(config)
