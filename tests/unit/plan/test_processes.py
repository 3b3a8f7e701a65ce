"""Which process is where and what it holds, against numbers worked out by hand."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lorelei.cli import main as cli
from lorelei.config.errors import ConfigError
from lorelei.config.machine import amount
from lorelei.config.rollout import ServerRollout
from lorelei.inference.kinds import SERVERS
from lorelei.inference.sglang.backend import arguments as sglang_arguments
from lorelei.inference.vllm.backend import arguments
from lorelei.launch.servers import server_options
from lorelei.model.load import read_config
from lorelei.model.shapes import SHAPES, find_shape
from lorelei.plan.hardware import Hardware, seat, wanted
from lorelei.plan.memory import ProcessGroup
from lorelei.plan.model_info import decoder_info
from lorelei.plan.plan import Plan, plan
from lorelei.run_file import load_config
from tests.areal.examples import example

GSM8K = Path("recipes/gsm8k")
TWINS = {  # ours: AReaL's
    "fsdp-sglang": "gsm8k_grpo_lora",
    "megatron-vllm": "gsm8k_grpo_megatron_lora",
    "megatron-vllm-moe": "gsm8k_grpo_megatron_lora_moe",
}
GIB = 1 << 30
LLAMA_70B = 70_553_706_496
BLOCK_70B = 2 * 8192 * (8192 + 1024) + 3 * 8192 * 28672 + 2 * 8192


def planned(path: Path, *overrides: str) -> Plan:
    config = load_config(path, overrides)
    return plan(config, wanted(config.machine))


def group(plan: Plan, role: str) -> ProcessGroup:
    (found,) = [g for g in plan.processes if g.role == role]
    return found


def held(group: ProcessGroup) -> dict[str, int]:
    return {part.name: part.bytes for part in group.parts}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A run on a small model of which there is only a config.json."""
    raw: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(raw))
    path = tmp_path / "run.yaml"
    path.write_text("model: .\ndtype: bfloat16\ntask: {kind: reasoning_gym, name: chain_sum}\n")
    return path


@pytest.mark.parametrize("ours", TWINS)
def test_the_twins_of_areals_examples_say_what_the_examples_say(ours):
    twin, theirs = load_config(GSM8K / f"{ours}.yaml"), load_config(example(TWINS[ours]))
    assert twin.experiments() == theirs.experiments()
    for section in ("model", "dtype", "train", "rollout", "publish"):
        assert getattr(twin, section) == getattr(theirs, section), section
    assert (twin.machine.nodes, twin.machine.devices) == (1, 8)


@pytest.mark.parametrize("ours", [*TWINS, "70b"])
def test_the_recipes_fit_eight_devices_of_80_gb(ours):
    found = planned(GSM8K / f"{ours}.yaml")
    assert found.problems == ()
    assert found.device == "accelerator" and found.device_memory == 80 * 10**9
    places = [place for g in found.processes for place in g.places if place != "cpu"]
    assert sorted(places) == [f"gpu {n}" for n in range(8)], "every device has one process"
    assert all(g.bytes <= found.device_memory for g in found.processes)


@pytest.mark.parametrize("name", TWINS.values())
def test_areals_examples_plan_as_they_are(name):
    found = planned(example(name))
    assert [g.role for g in found.processes][1:] == [
        f"{'fsdp' if name == 'gsm8k_grpo_lora' else 'megatron'} rank",
        f"{'sglang' if name == 'gsm8k_grpo_lora' else 'vllm'} server",
    ]


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("meta-llama/Llama-3.1-70B-Instruct", LLAMA_70B),
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248),
        ("Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304),
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("Qwen/Qwen3-30B-A3B-Base", 30_532_122_624),
    ],
)
def test_shapes_that_come_with_us_have_the_published_numbers_of_parameters(tiny, name, published):
    assert planned(tiny, f"model={name}").total_parameters == published


def test_a_model_on_this_machine_is_looked_at_before_the_shapes(tiny, monkeypatch, tmp_path):
    assert find_shape(str(tiny.parent)) == tiny.parent
    assert find_shape("Qwen/Qwen3-0.6B") == SHAPES / "Qwen--Qwen3-0.6B"
    cached = tmp_path / "cache" / "models" / "Qwen--Qwen3-0.6B"
    cached.mkdir(parents=True)
    (cached / "config.json").write_text("{}")
    monkeypatch.setenv("LORELEI_CACHE", str(tmp_path / "cache"))
    assert find_shape("Qwen/Qwen3-0.6B") == cached


def test_fsdp_shards_the_base_of_a_70b_and_gathers_two_blocks():
    rank = held(group(planned(GSM8K / "70b.yaml"), "fsdp rank"))
    assert rank["base model"] == 2 * LLAMA_70B // 4
    assert rank["gathered blocks"] == pytest.approx(2 * 2 * BLOCK_70B, rel=1e-4)
    assert rank["gathered ends"] == 2 * 2 * 128256 * 8192
    sides = 2 * 16384 + 2 * 9216 + 3 * 36864  # in + out of q, o; k, v; gate, up, down
    adapters = 80 * 16 * sides * 4
    assert (rank["adapters"], rank["gradients"]) == (adapters, adapters)
    assert rank["optimizer"] == 2 * adapters
    assert rank["activations"] == 8192 * 80 * 8192 * 2


def test_what_a_vllm_server_has_left_are_keys_and_values():
    server = held(group(planned(GSM8K / "70b.yaml"), "vllm server"))
    assert server["base model"] == 2 * LLAMA_70B // 4
    slots = 4 * 80 * 16 * (2 * 16384 + 2 * 9216 + 3 * 36864) * 2
    assert server["adapter slots"] == slots
    assert sum(server.values()) == pytest.approx(0.9 * 80e9, rel=1e-9)
    (how,) = [p.how for p in group(planned(GSM8K / "70b.yaml"), "vllm server").parts[-1:]]
    of_token = 80 * 2 * (8 // 4) * 128 * 2
    assert f"{server['KV cache'] // of_token:,} tokens of {of_token:,} bytes" in how


def test_sglang_has_room_for_adapted_layers_only_and_the_base_takes_a_place(tiny):
    cut = ("rollout={kind: sglang}", "lora.target_modules=[q_proj]", "lora.lora_rank=12")
    server = held(group(planned(tiny, *cut, "machine={devices: 2, memory: 1GB}"), "sglang server"))
    assert server["adapter slots"] == (2 + 1) * 4 * 12 * (64 + 128) * 2
    vllm = ("rollout={kind: vllm}", *cut[1:])
    server = held(group(planned(tiny, *vllm, "machine={devices: 2, memory: 1GB}"), "vllm server"))
    of_layer = (64 + 128) + 2 * (64 + 64) + (128 + 64) + 3 * (64 + 96)
    assert server["adapter slots"] == 2 * 4 * 16 * of_layer * 2, "rank 12 is rounded up"


@pytest.mark.parametrize("kind", SERVERS)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_server_is_started_with_the_room_that_the_plan_counts(tiny, kind, processes):
    rollout = (
        f"{{kind: {kind}, tensor_parallel_size: {processes}, max_running: 3, max_context: 96}}"
    )
    lora = ("lora.target_modules=[q_proj]", "lora.lora_rank=12")
    config = load_config(tiny, (f"rollout={rollout}", *lora))
    server = held(group(plan(config), f"{kind} server"))
    info = decoder_info(read_config(tiny.parent))
    assert isinstance(config.rollout, ServerRollout)
    options = server_options(config, config.rollout, tiny.parent, info, "cpu")
    words = arguments(options, 1) if kind == "vllm" else sglang_arguments(options, 0, 1)
    given = {k: v for k, v in itertools.pairwise(words) if k.startswith("--")}
    versions = int(given["--max-loras" if kind == "vllm" else "--max-loras-per-batch"])
    q = 64 + 128
    of_layer = q + 2 * (64 + 64) + (128 + 64) + 3 * (64 + 96) if kind == "vllm" else q
    assert server["adapter slots"] == versions * int(given["--max-lora-rank"]) * 4 * of_layer * 2
    room = options.cpu_cache_gib << 30
    if kind == "sglang":
        room = int(given["--max-total-tokens"]) * 4 * 2 * (2 // processes) * 32 * 2
    assert server["KV cache"] == room


def test_an_a_that_fused_layers_share_counts_once():
    found = planned(GSM8K / "megatron-vllm.yaml")
    (adapter,) = found.adapters
    of_layer = 1024 + 2048 + 2 * 1024  # A and three B of qkv
    of_layer += 2048 + 1024  # proj
    of_layer += 1024 + 2 * 3072 + 3072 + 1024  # fc1, fc2
    assert adapter.parameters == 28 * 16 * of_layer
    assert held(group(found, "megatron rank"))["adapters"] == 4 * adapter.parameters


def test_a_pipeline_splits_layers_and_its_first_stage_keeps_all_micro_batches():
    rank = group(planned(GSM8K / "megatron-vllm-moe.yaml"), "megatron rank")
    amounts = held(rank)
    block = 2048 * (4096 + 2 * 512) + 4096 * 2048 + 128 * 3 * 2048 * 768 + 128 * 2048
    norms = 48 * (2 * 2048 + 2 * 128) + 2048
    layers = 8 * block + norms * 8 // 48
    assert amounts["base model"] == pytest.approx(2 * (layers + 151936 * 2048), abs=4)
    (how,) = [p.how for p in rank.parts if p.name == "activations"]
    assert how.startswith("6 micro-batches x 10,240 tokens x 8 layers")


def test_a_stage_of_two_holds_half_of_the_layers_of_one(tiny):
    more = ("rollout.n_samples=4", "machine={devices: 4, memory: 80GB}", "rollout={kind: vllm}")
    one, two = (
        held(group(planned(tiny, f"train={{kind: megatron{size}}}", *more), "megatron rank"))
        for size in ("", ", pipeline_parallel: 2")
    )
    assert two["adapters"] * 2 == one["adapters"]
    # the last stage of a tiny model holds most, its logits: one micro-batch, half of the layers
    assert two["activations"] * 2 == one["activations"]


def test_tensor_parallel_and_context_divide_what_a_rank_holds(tiny):
    more = ("machine={devices: 4, memory: 80GB}", "rollout={kind: vllm}")

    def rank(train: str) -> dict[str, int]:
        return held(group(planned(tiny, f"train={train}", *more), "fsdp rank"))

    one, tensor = rank("{kind: fsdp}"), rank("{kind: fsdp, tensor_parallel: 2}")
    # the embedding and the head stay whole
    assert one["base model"] // 2 < tensor["base model"] < one["base model"]
    assert "gathered blocks" not in tensor, "nothing is sharded over one rank"
    data = rank("{kind: fsdp, data_parallel: 2}")
    assert data["base model"] == one["base model"] // 2
    assert data["gathered blocks"] > 0
    sequence = rank("{kind: fsdp, sequence_parallel: 2}")
    assert sequence["activations"] == pytest.approx(one["activations"] / 2, rel=0.01)
    for layout in ("", "data_parallel: 2, "):
        offloaded = rank(f"{{kind: fsdp, {layout}cpu_offload: true}}")
        assert offloaded["base model"] == 0 < offloaded["gathered blocks"]
    on_cpu = planned(tiny, "train={kind: fsdp, data_parallel: 2, cpu_offload: true}")
    assert held(group(on_cpu, "fsdp rank"))["base model"] > 0, "it is in the CPU's memory"


def test_a_run_over_servers_counts_no_sampling_in_the_trainer(tiny):
    embedded, served = planned(tiny), planned(tiny, "rollout={kind: vllm}")
    assert "KV cache" in embedded.memory["sampling"]
    assert set(served.memory) == {"loading", "training", "saving"}
    assert all("KV cache" not in parts for parts in served.memory.values())
    assert all("decode copy" not in parts for parts in served.memory.values())
    assert [g.role for g in served.processes] == [
        "controller",
        "trainer, in the controller",
        "vllm server",
    ]
    assert held(group(served, "vllm server"))["KV cache"] == 2 * GIB, "rollout.cpu_cache_gib"
    assert "programs" not in held(group(served, "trainer, in the controller"))


def test_servers_that_run_already_are_named_and_not_counted(tiny):
    found = planned(tiny, "rollout={kind: vllm, urls: ['http://a:1', 'http://b:2']}")
    server = group(found, "vllm server")
    assert (server.places, server.parts) == (("http://a:1", "http://b:2"), ())


def test_an_embedded_sampler_beside_ranks_has_a_device_of_its_own(tiny):
    train = "train={kind: fsdp, data_parallel: 2}"
    found = planned(tiny, train, "machine={devices: 3, memory: 1GB}")
    assert group(found, "fsdp rank").places == ("gpu 0", "gpu 1")
    sampler = group(found, "sampler, in the controller")
    assert sampler.places == ("gpu 2",)
    assert held(sampler)["KV cache"] > 0


def test_what_does_not_fit_says_where_and_by_how_much():
    found = planned(GSM8K / "70b.yaml", "machine.memory=40GB")
    assert any("gpu 0 would hold 57.1 GiB of 37.3" in problem for problem in found.problems)
    assert any(
        "a vllm process has no room for the keys and values of one sequence of 2,048" in problem
        for problem in planned(GSM8K / "70b.yaml", "machine.memory=39GB").problems
    )


def test_too_few_devices_are_refused_with_who_takes_them():
    with pytest.raises(ConfigError) as caught:
        planned(GSM8K / "70b.yaml", "machine.devices=6")
    assert str(caught.value) == (
        "machine.devices: 6 on 1 node have no room for 4 train ranks beside 4 processes of "
        "servers, each server on one node; raise it, or lower train's sizes or rollout.replicas"
    )


def test_a_server_stays_on_one_node_where_it_can():
    machines = Hardware(nodes=2, devices=4, here=False)
    assert seat(machines, [3, 2, 2]) == [
        ("node 0 gpu 0", "node 0 gpu 1", "node 0 gpu 2"),
        ("node 1 gpu 0", "node 1 gpu 1"),
        ("node 1 gpu 2", "node 1 gpu 3"),
    ]
    assert seat(machines, [8])[0][-1] == "node 1 gpu 3", "one that is larger is spread"
    assert seat(Hardware(), [2, 1]) == [("cpu", "cpu"), ("cpu",)]


def test_this_machines_devices_may_be_shared():
    assert seat(Hardware(devices=1), [1, 1]) == [("gpu 0",), ("gpu 0",)]


@pytest.mark.parametrize(
    ("text", "number"), [("80GB", 80 * 10**9), ("79 GiB", 79 * GIB), ("0.5gb", 5 * 10**8)]
)
def test_amounts_have_units(text, number):
    assert amount(text) == number


def test_an_amount_without_a_unit_is_refused(tiny):
    with pytest.raises(ConfigError, match=r"machine\.memory: '80' is not allowed; write a number"):
        load_config(tiny, ["machine.memory='80'"])


def test_the_command_takes_the_machine_and_prints_the_arithmetic(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ["plan", str(GSM8K / "70b.yaml"), "--devices", "4", "--nodes", "2"]
    monkeypatch.setattr(sys, "argv", ["lorelei", *arguments, "--memory", "80GB"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 0
    out = capsys.readouterr().out
    assert "node 0 gpu 0 to 3" in out and "node 1 gpu 0 to 3" in out
    assert "70,553,706,496 parameters x 2 bytes / 4 shards" in out
    assert "fits: at most 67.1 of 74.5 GiB of a device" in out


def test_the_page_shows_what_the_command_prints(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "argv", ["lorelei", "plan", str(GSM8K / "70b.yaml")])
    with pytest.raises(SystemExit):
        cli.main()
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    printed = "\n".join(line for line in lines if line)
    shown = Path("docs/planning.md").read_text().partition("plan recipes/gsm8k/70b.yaml\n")[2]
    assert shown.partition("\n```")[0] == printed, "COLUMNS=120 lorelei plan, without empty lines"


def test_on_ray_even_a_single_rank_is_a_process_of_its_own(tiny):
    cluster = ("cluster.kind=ray", "rollout.kind=sglang", "machine.devices=2", "machine.nodes=2")
    found = planned(tiny, *cluster, "machine.memory=80GB")
    roles = {g.role: g.places for g in found.processes}
    assert roles == {
        "controller": ("cpu",),
        "archon rank, on Ray": ("node 0 gpu 0",),
        "sglang server, on Ray": ("node 0 gpu 1",),
    }
    assert found.memory == {}, "this machine holds neither"
