"""What a server would ignore or crash on is refused with the reason, before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorelei.config.errors import ConfigError
from lorelei.inference.kinds import INFERENCE
from lorelei.lora.targets import module_shapes
from lorelei.model.config import DecoderConfig
from lorelei.model.load import read_config
from lorelei.run_file import load_config
from tests.tiny_models import make_tiny
from tests.tiny_runs import write_run


def check(folder: Path, family: str, targets: str, on_cpu: bool, **rollout: Any) -> None:
    model = read_config(make_tiny(family, folder / "model"))
    modules = [name for name in module_shapes(model) if targets in name]
    assert modules
    config = load_config(write_run(folder, "run", rollout=rollout))
    INFERENCE[config.rollout.kind].check(config, DecoderConfig.from_hf(model), modules, on_cpu)


@pytest.mark.parametrize(
    ("kind", "what"), [("vllm", "silently leaves them out"), ("sglang", "crashes on them")]
)
def test_adapters_of_experts_are_refused_on_a_cpu_only(
    tmp_path: Path, kind: str, what: str
) -> None:
    with pytest.raises(ConfigError, match=rf"experts\.0\.\w+ is of an expert, and {kind}.*{what}"):
        check(tmp_path, "qwen3_moe", ".experts.", on_cpu=True, kind=kind)
    check(tmp_path, "qwen3_moe", ".experts.", on_cpu=False, kind=kind)
    check(tmp_path, "qwen3_moe", ".self_attn.", on_cpu=True, kind=kind)
    check(tmp_path, "qwen3_moe", ".experts.", on_cpu=True, kind="embedded")


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_workers_that_cannot_share_the_heads_are_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ConfigError, match=r"tensor_parallel_size: 3 .* 4 attention heads"):
        check(tmp_path, "llama", "q_proj", on_cpu=True, kind=kind, tensor_parallel_size=3)
    check(tmp_path, "llama", "q_proj", on_cpu=True, kind=kind, tensor_parallel_size=2)


def test_layers_that_sglang_would_pad_are_refused_on_a_cpu(tmp_path: Path) -> None:
    """2 key and value heads, and 96 features of the MLP: padded, no adapter fits them."""
    split = {"kind": "sglang", "tensor_parallel_size": 2}
    with pytest.raises(ConfigError, match=r"tensor_parallel_size: .* 2 processes .* 64 .* not 96"):
        check(tmp_path, "llama", ".mlp.down_proj", on_cpu=True, **split)
    check(tmp_path, "llama", ".self_attn.", on_cpu=True, **split)
    check(tmp_path, "llama", ".mlp.down_proj", on_cpu=False, **split)
    check(tmp_path, "llama", ".mlp.down_proj", on_cpu=True, **{**split, "kind": "vllm"})
    check(tmp_path, "llama", ".mlp.down_proj", on_cpu=True, kind="sglang")
    with pytest.raises(ConfigError, match="4 processes cannot share 2 key and value heads"):
        check(tmp_path, "llama", "q_proj", on_cpu=True, kind="sglang", tensor_parallel_size=4)


def test_a_head_size_that_vllm_has_no_kernel_for_is_refused(tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "odd", head_dim=24)
    config = load_config(write_run(tmp_path, "run", rollout={"kind": "vllm"}))
    decoder = DecoderConfig.from_hf(read_config(model))
    with pytest.raises(ConfigError, match="head_dim 24"):
        INFERENCE["vllm"].check(config, decoder, ["model.layers.0.self_attn.q_proj"], True)
