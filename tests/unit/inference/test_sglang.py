"""SGLang's command line, and the parts of its hooks that need no SGLang."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorelei.config.errors import FieldError
from lorelei.config.extra_args import SGLANG, check_extra_args
from lorelei.inference.server.options import ServerOptions, binding
from lorelei.inference.sglang.backend import arguments, check_model
from lorelei.inference.sglang.in_server.sampling import uniforms
from lorelei.inference.sglang.kind import SPARE
from tests.tiny_models import sizes_of, tiny_config


def options(folder: Path, family: str, *target_modules: str) -> ServerOptions:
    tiny_config(family).save_pretrained(folder)
    return ServerOptions(
        model=folder,
        sizes=sizes_of(folder),
        dtype="float32",
        context=256,
        max_rank=16,
        target_modules=target_modules,
        versions=4,
        max_running=8,
        tensor_parallel=1,
        device="cpu",
        has_tokenizer=True,
        threads=1,
        cpu_cache_gib=1,
        extra_args={"chunked_prefill_size": 512, "disable-radix-cache": True},
    )


def test_the_command_line_follows_from_the_run(tmp_path: Path) -> None:
    words = arguments(options(tmp_path, "llama", "q_proj", "v_proj"), 0, 4000)

    def value(name: str) -> str:
        return words[words.index(f"--{name}") + 1]

    assert value("context-length") == str(256 + SPARE)
    assert (value("max-lora-rank"), value("max-running-requests")) == ("16", "8")
    assert value("max-loras-per-batch") == "5"  # the base model takes a place
    assert value("max-total-tokens") == str(8 * (256 + SPARE))
    assert value("chunked-prefill-size") == "512"
    assert "--disable-radix-cache" in words
    assert words[-3:] == ("--lora-target-modules", "q_proj", "v_proj")


@pytest.mark.parametrize("name", sorted(SGLANG))
def test_options_that_follow_from_the_run_are_refused(name: str) -> None:
    for written in (name, f"--{name}", name.replace("-", "_")):
        with pytest.raises(FieldError, match="follows from"):
            check_extra_args(SGLANG, {written: 1})
    check_extra_args(SGLANG, {"chunked_prefill_size": 512})


def test_adapted_experts_are_refused_before_a_cpu_server_starts(tmp_path: Path) -> None:
    experts = options(tmp_path, "qwen3_moe", "q_proj", "down_proj")
    with pytest.raises(FieldError, match=r"down_proj of a mixture of experts.*embedded"):
        check_model(experts)
    check_model(replace(experts, target_modules=("q_proj", "o_proj")))
    check_model(replace(experts, device="cuda"))


def test_uniform_numbers_depend_on_seed_and_position_and_on_nothing_else() -> None:
    seeds = torch.arange(-50, 50, dtype=torch.int64).repeat_interleave(100) * (1 << 56)
    positions = torch.arange(100).repeat(100)
    drawn = uniforms(seeds, positions)
    assert drawn.unique().numel() == 10_000
    assert drawn.min() >= 0 and drawn.max() < 1
    assert torch.equal(drawn[4200:4210], uniforms(seeds[4200:4210], positions[4200:4210]))
    # the mean of 10 000 uniform numbers is within 4 of its deviations (0.0029) of a half; the
    # counts in 20 bins of 500 give chi-squared below 43.8 with probability 0.999
    assert abs(drawn.mean() - 0.5) < 0.0116
    counts = torch.histc(drawn, 20, 0, 1)
    assert ((counts - 500) ** 2 / 500).sum() < 43.8
    by_seed = drawn.view(100, 100)
    assert torch.corrcoef(by_seed).fill_diagonal_(0).abs().max() < 0.5


def test_servers_on_a_cpu_share_its_numa_nodes(tmp_path: Path) -> None:
    """SGLang gives each device number a NUMA node: a second server, or worker, may have none."""
    of_cpu = options(tmp_path, "llama", "q_proj")
    assert "--base-gpu-id" not in arguments(of_cpu, 1, 4000)
    words = arguments(replace(of_cpu, device="cuda", tensor_parallel=2), 1, 4000)
    assert words[words.index("--base-gpu-id") + 1] == "2"
    groups = binding(replace(of_cpu, tensor_parallel=2), 0).split("|")
    assert len(groups) == 2 and all(group.isdecimal() for group in groups)
