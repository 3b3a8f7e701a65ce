"""Parallel sizes, as AReaL writes them."""

from __future__ import annotations

import pytest

from lorelei.config.errors import ConfigError
from lorelei.config.parallel import (
    Backend,
    ParallelSizes,
    parse_allocation,
    parse_backend,
)

PP6 = ParallelSizes(pipeline=6)


@pytest.mark.parametrize(
    ("text", "kind", "sizes", "world"),
    [
        ("fsdp:d4", "fsdp", ParallelSizes(data=4), 4),
        ("megatron:d4p1t1", "megatron", ParallelSizes(data=4), 4),
        ("megatron:(attn:d1p6t1c1|ffn:d1p6t1e1)", "megatron", PP6, 6),
        ("archon:d2t2", "archon", ParallelSizes(data=2, tensor=2), 4),
        ("sglang:d4", "sglang", ParallelSizes(data=4), 4),
        ("vllm:d4p1t1", "vllm", ParallelSizes(data=4), 4),
        ("vllm:d1p1t2", "vllm", ParallelSizes(tensor=2), 2),
        ("fsdp:t2c2d2", "fsdp", ParallelSizes(data=2, tensor=2, context=2), 8),
        (
            "megatron:(attn:d2p2t2c2|ffn:d2p2t1e4)",
            "megatron",
            ParallelSizes(data=2, pipeline=2, tensor=2, context=2, expert=4, expert_tensor=1),
            16,
        ),
        ("megatron:d4e4", "megatron", ParallelSizes(data=4, expert=4), 4),
    ],
)
def test_a_backend_is_its_engine_and_its_sizes(text, kind, sizes, world):
    found = parse_backend(text, "actor.backend")
    assert found == Backend(kind=kind, sizes=sizes)
    assert found.sizes.world == world


@pytest.mark.parametrize(
    ("text", "rollout", "train", "shared"),
    [
        ("sglang:d4+fsdp:d4", "sglang", "fsdp", False),
        ("sglang.d4p1t1+d4p1t1", "sglang", "fsdp", False),
        ("vllm:d8p1t1+d8p1t1", "vllm", "fsdp", False),
        ("vllm:d4+d2p2", "vllm", "megatron", False),
        ("sglang:d4|fsdp:d4", "sglang", "fsdp", True),
        ("sglang:d4+megatron:(attn:d1p4|ffn:d1p4)", "sglang", "megatron", False),
        ("vllm:d2+(attn:d2p1|ffn:d1p1e2)", "vllm", "megatron", False),
    ],
)
def test_an_allocation_is_who_samples_and_who_trains(text, rollout, train, shared):
    found = parse_allocation(text, "allocation_mode")
    assert (found.rollout.kind, found.train.kind, found.shared) == (rollout, train, shared)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fsdp", "write an engine and its sizes, such as fsdp:d4"),
        ("d4", "write an engine and its sizes"),
        ("fsdp:", "write letters with numbers, such as d4p1t2"),
        ("fsdp:4", "write letters with numbers"),
        ("fsdp:d4x2", "'x' is none of: d data, p pipeline, t tensor, c context, e expert"),
        ("fsdp:d4d2", "'d' is given twice; remove one"),
        ("fsdp:d0", "d0 is no size; use 1 or more"),
        ("megatron:(attn:d1p6e1|ffn:d1p6)", "'e' is none of: d data, p pipeline, t tensor, c"),
        ("megatron:(attn:d1p6|ffn:d1p3e2)", "attn has p6 and ffn p3"),
        ("megatron:(attn:d2p1|ffn:d1p1e4)", "attn takes 2 processes and ffn 4; use as many"),
        ("megatron:(ffn:d1|attn:d1)", "write letters with numbers"),
        ("megatron:d2e4", "2 processes cannot hold experts in pipeline 1 x expert 4"),
    ],
)
def test_what_is_no_backend_names_field_value_and_fix(text, words):
    with pytest.raises(ConfigError) as caught:
        parse_backend(text, "actor.backend")
    assert str(caught.value).startswith("actor.backend: '")
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["sglang:d4", "a:d1+b:d1+c:d1", ""])
def test_an_allocation_has_two_sides(text):
    with pytest.raises(ConfigError, match="write who samples and who trains"):
        parse_allocation(text, "allocation_mode")
