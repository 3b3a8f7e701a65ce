"""Mixtures of experts on servers: what can be adapted on a CPU is their attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.contract.servers import ATTENTION, TOKEN, Servers
from tests.environments import needs
from tests.tiny_runs import lorelei, make_workplace, records, write_run


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    return make_workplace(tmp_path_factory.mktemp("place"), tiny_tokenizer, "qwen3_moe")


@pytest.mark.brief
@needs("sglang")
def test_attention_of_a_mixture_of_experts_trains_over_a_server(
    place: Path, servers: Servers, folders: dict[str, Path]
) -> None:
    url = servers.url("sglang", folders["qwen3_moe"])
    sections: dict[str, Any] = {
        "rollout": {
            "kind": "sglang",
            "urls": [url],
            "n_samples": 4,
            "max_new_tokens": 8,
            "max_head_offpolicyness": 1,
        },
        "publish": {"kind": "xccl"},
        "lora": {"target_modules": list(ATTENTION)},
        "eval": {"every": 0},
    }
    write_run(place, "attention", **sections)
    lorelei(place, "train", "attention.yaml", LORELEI_SERVER_TOKEN=TOKEN)
    steps = records(place / "runs/attention", "step")
    assert [step["step"] for step in steps] == [1, 2, 3]
    for step in steps:
        assert step["publish_fallbacks"] == 0
        assert step["canary_version"] < 1e-5 < step["canary_base"]
