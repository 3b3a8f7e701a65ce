"""The targets that an error suggests are those of the adapter."""

from __future__ import annotations

import pytest

from lorelei.lora.targets import match_targets, module_patterns, module_shapes
from lorelei.types import AdapterSpec
from tests.tiny_models import tiny_config

NAMES = list(
    module_shapes(
        tiny_config("qwen3_moe", num_hidden_layers=12, mlp_only_layers=[0]).to_dict()
        | {"architectures": ["Qwen3MoeForCausalLM"]}
    )
)


@pytest.mark.parametrize(
    "held",
    [
        [n for n in NAMES if "layers.1." in n],  # not layers 10 and 11
        [n for n in NAMES if n.endswith("q_proj") and ("layers.2." in n or "layers.11." in n)],
        [n for n in NAMES if "experts" in n and "gate" not in n],
        [n for n in NAMES if "layers.0.mlp" in n or "layers.3.self_attn" in n],
        ["lm_head", "model.layers.0.mlp.up_proj"],
        NAMES,
    ],
)
def test_suggested_targets_match_the_modules_and_no_others(held: list[str]) -> None:
    targets = tuple(module_patterns(held))
    spec = AdapterSpec(rank=4, alpha=8, target_modules=targets)
    assert match_targets(NAMES, spec, "a model") == [n for n in NAMES if n in held]
    assert len(targets) <= 4
