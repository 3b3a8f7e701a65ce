"""Who decodes next in the embedded engine."""

from __future__ import annotations

import asyncio

import numpy as np

from lorelei.inference.embedded.scheduler import Row, Scheduler
from lorelei.types import AdapterRef, GenerateRequest, SamplingParams


def submit(scheduler: Scheduler, prompt: list[int], adapter: str | None = None) -> Row:
    ref = None
    if adapter is not None:
        ref = AdapterRef(name=adapter, version=1, run_id="r", digest="d" * 64)
    request = GenerateRequest(
        tokens=np.array(prompt, dtype=np.int32), adapter=ref, sampling=SamplingParams(), key=""
    )
    loop = asyncio.new_event_loop()
    future = loop.create_future()
    loop.close()
    row = Row(request, future, scheduler.prompt(request), 8, np.zeros(8), None)
    scheduler.submit(row)
    return row


def test_rows_start_in_order_of_arrival_up_to_max_running() -> None:
    scheduler = Scheduler(max_running=2, prefill_tokens=100)
    rows = [submit(scheduler, [i]) for i in range(3)]
    assert scheduler.admit() == rows[:2]
    assert scheduler.admit() == []
    assert scheduler.leave(rows[0]) == 0
    assert scheduler.admit() == [rows[2]]


def test_equal_prompts_of_one_adapter_are_one_prompt() -> None:
    scheduler = Scheduler(max_running=9, prefill_tokens=100)
    a, b = submit(scheduler, [1, 2]), submit(scheduler, [1, 2])
    other, adapted = submit(scheduler, [1]), submit(scheduler, [1, 2], "x")
    assert a.prompt is b.prompt
    assert len({a.prompt, other.prompt, adapted.prompt}) == 3


def test_a_prompt_is_forgotten_with_its_last_row_waiting_ones_included() -> None:
    scheduler = Scheduler(max_running=1, prefill_tokens=100)
    first, second = submit(scheduler, [1], "x"), submit(scheduler, [1], "x")
    scheduler.admit()
    scheduler.leave(first)
    assert scheduler.uses(second.prompt.adapter or "")
    assert submit(scheduler, [1], "x").prompt is second.prompt
    scheduler.drop(scheduler.waiting[1])
    scheduler.drop(second)
    assert not scheduler.uses(second.prompt.adapter or "")
    assert submit(scheduler, [1], "x").prompt is not second.prompt


def test_the_prefill_budget_counts_each_prompt_once_and_lets_a_long_one_through_alone() -> None:
    scheduler = Scheduler(max_running=9, prefill_tokens=5)
    long = submit(scheduler, [1] * 7)
    rows = [submit(scheduler, [2, 3, 4]) for _ in range(3)]
    late = submit(scheduler, [5, 6, 7])
    assert scheduler.admit() == [long]
    assert scheduler.admit() == rows
    assert scheduler.admit() == [late]


def test_the_last_row_takes_the_slot_of_one_that_leaves() -> None:
    scheduler = Scheduler(max_running=9, prefill_tokens=100)
    a, b, c = (submit(scheduler, [i]) for i in range(3))
    scheduler.admit()
    assert scheduler.leave(a) == 0
    assert scheduler.running == [c, b]
    assert scheduler.leave(b) == 1
    assert scheduler.running == [c]


def test_slots_are_ordered_by_adapter_then_prompt() -> None:
    scheduler = Scheduler(max_running=9, prefill_tokens=100)
    for prompt, adapter in (([1], "b"), ([2], None), ([1], "a"), ([3], "b"), ([1], "b")):
        submit(scheduler, prompt, adapter)
    scheduler.admit()
    assert scheduler.by_prompt() == [1, 2, 0, 4, 3]


def test_pending_steps_are_those_of_the_adapters_row_with_most_left() -> None:
    scheduler = Scheduler(max_running=1, prefill_tokens=100)
    row = submit(scheduler, [1], "a")
    submit(scheduler, [1], "a")
    submit(scheduler, [1])
    scheduler.admit()
    row.tokens += [4, 5, 6]
    assert scheduler.pending_steps(row.prompt.adapter) == 8
    assert scheduler.pending_steps("b") == 0
