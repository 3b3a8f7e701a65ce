"""The reward pool survives whatever a reward does; the processes are real."""

from __future__ import annotations

import asyncio
import os
import signal
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from lorelei.config.reward import RewardConfig
from lorelei.reward.contract import RewardResult
from lorelei.reward.pool import RewardPool, make_pool

BAD_REWARDS = """
import ctypes, os, subprocess, sys, time
import numpy as np

def act(completion):
    match completion:
        case "hang": time.sleep(1000)
        case "spin":
            while True: pass
        case "child": subprocess.run(["sleep", "1000.5"])
        case "exit": os._exit(3)
        case "sys.exit": sys.exit("bye")
        case "segfault": ctypes.string_at(0)
        case "memory": return len(bytearray(64 * 2**30))
        case "raise": raise KeyError("no such key")
        case "lines": raise RuntimeError("one\\ntwo")
        case "print": print("{", flush=True); os.write(1, b"{}\\n")
        case "input": return len(sys.stdin.read())
        case "None": return None
        case "nan": return float("nan")
        case "inf": return -float("inf")
        case "str": return "1.0"
        case "huge": return 10**400
        case "list": return [1.0]
        case "bad metric": return 1.0, {"x": None}
        case "True": return True
        case "numpy": return np.float32(0.5)
        case "metrics": return 0.25, {"length": 7}
    return 1.0

def pid(completion): return os.getpid()
def threads(completion): return int(os.environ["OMP_NUM_THREADS"])
def torch_is_loaded(completion): return "torch" in sys.modules
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "bad.py").write_text(textwrap.dedent(BAD_REWARDS))
    return tmp_path


@pytest.fixture
def pool_of():
    pools: list[RewardPool] = []

    def pool_of(path: Path, function: str, **options: Any) -> RewardPool:
        pools.append(RewardPool("python", path=f"{path}:{function}", **options))
        return pools[-1]

    yield pool_of
    for pool in pools:
        pool.close()


def score(pool: RewardPool, *texts: str, **data: Any) -> list[RewardResult]:
    async def run() -> list[RewardResult]:
        return await asyncio.gather(*(pool.score(data, text) for text in texts))

    return asyncio.run(run())


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_failures_have_a_kind_are_counted_and_cost_only_their_own_sample(folder, pool_of):
    pool = pool_of(folder / "bad.py", "act", workers=1)
    expected = {
        "exit": "crashed: exit status 3",
        "segfault": "crashed: SIGSEGV",
        "sys.exit": "raised SystemExit: bye",
        "memory": "raised MemoryError",
        "raise": "raised KeyError: 'no such key'",
        "lines": "raised RuntimeError: one two",
        "None": "not a number: None",
        "nan": "not a number: nan",
        "inf": "not a number: -inf",
        "str": "not a number: str",
        "huge": "not a number: inf",
        "list": "not a number: list",
        "bad metric": "not a number: metric x None",
    }
    texts = [text for bad in expected for text in (bad, "good")]
    results = score(pool, *texts)
    assert {t: r.error for t, r in zip(texts, results, strict=True) if t in expected} == expected
    assert all(r.value is None for t, r in zip(texts, results, strict=True) if t in expected)
    assert [r.value for r in results[1::2]] == [1.0] * len(expected)
    assert pool.errors == {
        "crashed": 2,
        "raised SystemExit": 1,
        "raised MemoryError": 1,
        "raised KeyError": 1,
        "raised RuntimeError": 1,
        "not a number": 7,
    }


@pytest.mark.parametrize("how", ["hang", "spin"])
def test_reward_that_hangs_times_out_and_its_worker_is_replaced(folder, pool_of, how):
    pool = pool_of(folder / "bad.py", "act", workers=1, timeout=0.5)
    started = time.monotonic()
    hung, good = score(pool, how, "good")
    assert (hung.value, hung.error, good.value) == (None, "timeout", 1.0)
    assert time.monotonic() - started < 10
    assert pool.errors == {"timeout": 1}


def test_timeout_kills_what_the_reward_started(folder, pool_of):
    pool = pool_of(folder / "bad.py", "act", workers=1, timeout=0.5)

    def sleepers() -> list[Path]:
        lines = (p for p in Path("/proc").glob("[0-9]*/cmdline"))
        return [p for p in lines if _read(p) == b"sleep\x001000.5\x00"]

    async def run() -> list[Path]:
        task = asyncio.create_task(pool.score({}, "child"))
        await asyncio.sleep(0.4)
        seen = sleepers()
        await task
        return seen

    assert asyncio.run(run()), "the reward's child must have been running"
    assert eventually(lambda: not sleepers())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # the process ended meanwhile
        return b""


def test_what_a_reward_prints_or_reads_does_not_reach_the_pipes(folder, pool_of):
    pool = pool_of(folder / "bad.py", "act", workers=1)
    values = [r.value for r in score(pool, "print", "good", "input", "good")]
    assert values == [1.0, 1.0, 0.0, 1.0]


def test_numbers_and_metrics_come_back_as_floats(folder, pool_of):
    pool = pool_of(folder / "bad.py", "act", workers=1)
    results = score(pool, "True", "numpy", "metrics")
    assert [r.value for r in results] == [1.0, 0.5, 0.25]
    assert [dict(r.metrics) for r in results] == [{}, {}, {"length": 7.0}]
    assert not pool.errors


def test_workers_share_the_work_and_one_that_hangs_holds_up_no_other(folder, pool_of):
    pool = pool_of(folder / "bad.py", "act", workers=2, timeout=3)

    async def run() -> tuple[float, RewardResult]:
        hung = asyncio.create_task(pool.score({}, "hang"))
        await asyncio.sleep(0.1)
        started = time.monotonic()
        results = await asyncio.gather(*(pool.score({}, "good") for _ in range(20)))
        assert all(r.value == 1.0 for r in results)
        return time.monotonic() - started, await hung

    seconds, hung = asyncio.run(run())
    assert seconds < 2.5
    assert hung.error == "timeout"


def test_workers_are_small_and_end_with_the_pool(folder, pool_of):
    path = folder / "bad.py"
    assert score(pool_of(path, "torch_is_loaded", workers=1), "")[0].value == 0.0
    assert score(pool_of(path, "threads", workers=1), "")[0].value == 1.0
    pool = pool_of(path, "pid", workers=1)
    (result,) = score(pool, "")
    assert result.value is not None and is_alive(int(result.value))
    pool.close()
    assert not is_alive(int(result.value))


def test_worker_killed_from_outside_is_replaced(folder, pool_of):
    pool = pool_of(folder / "bad.py", "pid", workers=1)
    (first,) = score(pool, "")
    assert first.value is not None
    os.kill(int(first.value), signal.SIGKILL)
    lost, second = score(pool, "", "")
    assert lost.error is not None and lost.error.startswith("crashed")
    assert second.value not in (None, first.value)


def test_closing_ends_scores_in_flight(folder, pool_of):
    pool = pool_of(folder / "bad.py", "act", workers=1, timeout=60)

    async def run() -> RewardResult:
        task = asyncio.create_task(pool.score({}, "hang"))
        await asyncio.sleep(0.2)
        await asyncio.to_thread(pool.close)
        return await task

    result = asyncio.run(run())
    assert result.error is not None and result.error.startswith("crashed")


def test_any_text_and_a_long_one_reach_the_reward(tmp_path, pool_of):
    path = tmp_path / "rewards.py"
    path.write_text("def length(completion): return len(completion)")
    pool = pool_of(path, "length", workers=1)
    texts = ["a\nb\r\n", "\udc80\x00é", "x" * 1_000_000]
    assert [r.value for r in score(pool, *texts)] == [5, 3, 1_000_000]


# --- a scorer that cannot be loaded


def check_start_error(call: Callable[[], object], *parts: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("def my_rewrd(completion): ...", ("has no function", "did you mean 'my_rewrd'?")),
        ("my_reward = 3", ("has no function 'my_reward'",)),
        ("import no_such_module", ("importing", "ModuleNotFoundError", "no_such_module")),
        ("def my_reward(:", ("importing", "SyntaxError")),
        ("raise SystemExit(1)", ("importing", "SystemExit")),
        ("import os; os._exit(4)", ("ended while starting", "exit status 4")),
        ("def my_reward(text): ...", ("my_reward(text)", "'completion'", "'completions'")),
    ],
)
def test_file_that_cannot_be_used_is_an_error_at_the_start(tmp_path, source, parts):
    path = tmp_path / "rewards.py"
    path.write_text(source)
    check_start_error(lambda: RewardPool("python", path=f"{path}:my_reward", workers=1), *parts)


def test_missing_file_is_an_error_at_the_start(tmp_path):
    path = tmp_path / "gone.py"
    check_start_error(
        lambda: RewardPool("python", path=f"{path}:f", workers=1), str(path), "no file"
    )


def test_pool_of_a_configuration_has_its_reward_and_deadline(folder):
    config = TypeAdapter(RewardConfig).validate_python(
        {"kind": "python", "path": f"{folder / 'bad.py'}:act", "timeout": 0.5, "workers": 1}
    )
    pool = make_pool(config)
    assert [r.error for r in score(pool, "good", "hang")] == [None, "timeout"]
    pool.close()


def test_weights_make_the_reward_a_sum_of_metrics(folder, pool_of):
    pool = pool_of(folder / "bad.py", "act", weights={"length": 0.5})
    result = asyncio.run(pool.score({}, "metrics"))
    assert (result.value, result.metrics) == (3.5, {"length": 7.0})
    missing = asyncio.run(pool.score({}, "fine"))
    assert missing.value is None
    assert missing.error == "not a number: reward.weights names 'length', the scorer has none"
    assert pool.errors["not a number"] == 1
