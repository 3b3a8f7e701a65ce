"""Which process of a run is where."""

from __future__ import annotations

from typing import Any

import pytest

from lorelei.config.load import validate
from lorelei.launch.placement import processes


def placed(accelerated: bool = True, **sections: Any) -> list[tuple[str, str, str, int | None]]:
    task = {"kind": "reasoning_gym", "name": "chain_sum"}
    config = validate({"model": "m", "task": task, **sections})
    return [(p.name, p.node, p.device, p.number) for p in processes(config, accelerated)]


def test_a_plain_run_is_one_process() -> None:
    assert placed() == [("controller with archon and embedded", "this machine", "accelerator", 0)]
    assert placed(accelerated=False)[0][2:] == ("cpu", None)


def test_workers_and_servers_of_this_machine_have_devices_of_their_own_kind() -> None:
    rollout = {"kind": "vllm", "replicas": 2, "tensor_parallel_size": 2}
    assert placed(train={"workers": 2}, rollout=rollout) == [
        ("controller", "this machine", "cpu", None),
        ("archon rank 0", "this machine", "accelerator", 0),
        ("archon rank 1", "this machine", "accelerator", 1),
        ("vllm server 0 part 0", "this machine", "accelerator", 0),
        ("vllm server 0 part 1", "this machine", "accelerator", 1),
        ("vllm server 1 part 0", "this machine", "accelerator", 2),
        ("vllm server 1 part 1", "this machine", "accelerator", 3),
    ]


def test_attached_servers_are_where_their_urls_say() -> None:
    found = placed(rollout={"kind": "sglang", "urls": ["http://10.0.0.3:30000", "http://b:1"]})
    assert found[0][0] == "controller with archon"
    assert [(name, node) for name, node, _, _ in found[1:]] == [
        ("sglang server 0", "10.0.0.3"),
        ("sglang server 1", "b"),
    ]


@pytest.mark.parametrize(
    ("spread", "node"),
    [
        ("pack", "a Ray node, few of them"),
        ("spread", "a Ray node, many of them"),
        ("strict", "a Ray node of its own"),
    ],
)
def test_on_ray_even_a_single_worker_is_on_a_node(spread: str, node: str) -> None:
    cluster = {"kind": "ray", "spread": spread}
    assert placed(cluster=cluster) == [
        ("controller with embedded", "this machine", "accelerator", 0),
        ("archon rank 0", node, "accelerator", None),
    ]
    found = placed(cluster=cluster, rollout={"kind": "sglang"})
    assert found[0] == ("controller", "this machine", "cpu", None)
    assert [name for name, *_ in found[1:]] == ["archon rank 0", "sglang server 0"]
