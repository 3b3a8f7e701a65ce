"""The reward pool survives whatever a reward does; the processes are real."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from lorelei.config.reward import RewardConfig
from lorelei.reward.contract import RewardResult, Sample
from lorelei.reward.environment import for_rewards
from lorelei.reward.group import GroupScores
from lorelei.reward.pool import Limits, RewardPool, make_pool
from lorelei.reward.trial import try_out

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
        "memory": "raised MemoryError: a worker may hold reward.memory_gib: 4 GiB, raise it",
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


def test_worker_killed_between_two_scores_costs_no_sample(folder, pool_of):
    pool = pool_of(folder / "bad.py", "pid", workers=1)
    (first,) = score(pool, "")
    assert first.value is not None
    os.kill(int(first.value), signal.SIGKILL)
    assert eventually(lambda: not is_alive(int(first.value or 0)))
    (second,) = score(pool, "")
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


# --- what a reward may return, and how


def reward_file(folder: Path, source: str) -> Path:
    path = folder / "rewards.py"
    path.write_text(textwrap.dedent(source))
    return path


@pytest.mark.parametrize(
    "source",
    [
        "async def f(completion): await asyncio.sleep(0); return 2.0",
        "async def f(completions, **columns): return [2.0 for c in completions]",
        "async def g(completion, bonus): return 1.0 + bonus\nf = functools.partial(g, bonus=1.0)",
        "f = lambda completion: later(2.0)",
        "class F:\n    async def __call__(self, completion): return 2.0\nf = F()",
        "class F:\n    def __call__(self, completions, **columns): return [2.0]\nf = F()",
        "class f:\n    def __call__(self, completion): return 2.0",
        "def f(completion): return asyncio.run(later(2.0))",
        "loops = set()\n"
        "async def f(completion):\n"
        "    loops.add(id(asyncio.get_running_loop()))\n"
        "    return 3.0 - len(loops)",
    ],
)
def test_async_and_callable_rewards_are_awaited(tmp_path, pool_of, source):
    head = "import asyncio, functools\nasync def later(value): return value\n"
    pool = pool_of(reward_file(tmp_path, head + source), "f", workers=1)
    assert [(r.value, r.error) for r in score(pool, "a", "b")] == [(2.0, None)] * 2


def test_awaited_reward_that_is_late_costs_its_sample_and_not_its_worker(tmp_path, pool_of):
    source = """
        import asyncio, os
        async def f(completion):
            await asyncio.sleep(60 if completion == "late" else 0)
            return os.getpid()
    """
    pool = pool_of(reward_file(tmp_path, source), "f", workers=1, timeout=0.5)
    first, late, second = score(pool, "", "late", "")
    assert (late.value, late.error) == (None, "timeout")
    assert first.value == second.value


def test_list_form_is_given_the_whole_group_in_its_order(tmp_path, pool_of):
    source = """
        def f(prompts, completions, answer, **columns):
            assert prompts == ["Say it."] * 3 and answer == ["x"] * 3, (prompts, answer)
            return [completions.index(c) + 10.0 * sorted(completions, key=len).index(c)
                    for c in completions]
    """
    pool = pool_of(reward_file(tmp_path, source), "f")
    row = {"prompt": "Say it.", "answer": "x"}

    async def run() -> list[RewardResult]:
        scores = GroupScores(4)

        async def rollout(number: int, text: str | None) -> RewardResult:
            with scores.member(number):
                await asyncio.sleep(0.01 * (4 - number))  # the last one is first
                if text is None:
                    raise RuntimeError("its environment failed")
                return await pool.score(row, text)

        texts = ["aaa", None, "a", "aa"]
        found = await asyncio.gather(
            *(rollout(n, t) for n, t in enumerate(texts)), return_exceptions=True
        )
        return [r for r in found if isinstance(r, RewardResult)]

    assert [r.value for r in asyncio.run(run())] == [20.0, 1.0, 12.0]


@pytest.mark.parametrize(
    "returned", ["np.array([1, 2])", "(1.0, 2.0)", "[np.float16(1), Number(2)]", "range(1, 3)"]
)
def test_list_form_may_return_whatever_holds_as_many_scores(tmp_path, pool_of, returned):
    source = f"""
        import numpy as np
        class Number(int): pass
        def f(completions, **columns): return {returned}
    """
    pool = pool_of(reward_file(tmp_path, source), "f", workers=1)
    samples = [Sample(data={}, completion=text) for text in ("a", "b")]
    assert [r.value for r in pool.score_now(samples)] == [1.0, 2.0]


@pytest.mark.parametrize(
    "returned", ["[1.0]", "[1.0, 2.0, 3.0]", "1.0", "'ab'", "{'a': 1, 'b': 2}"]
)
def test_list_form_that_returns_another_number_of_scores_fails_the_group(
    tmp_path, pool_of, returned
):
    path = reward_file(tmp_path, f"def f(completions, **columns): return {returned}")
    samples = [Sample(data={}, completion=text) for text in ("a", "b")]
    results = pool_of(path, "f", workers=1).score_now(samples)
    assert all(
        r.error and "it must return a list of 2, a score for each completion" in r.error
        for r in results
    )


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("def f(completions, trainer_state): ...", "asks for TRL's 'trainer_state'"),
        ("def f(completions, completion_ids): ...", "asks for TRL's 'completion_ids'"),
        ("def f(completion, /): ...", "must take its arguments by name"),
        ("class f:\n    def __init__(self, url): ...\n    def __call__(self, completion): ...",
         "name an instance"),
        ("class f: ...", "has no __call__"),
        ("import numpy as np\nt = np.zeros(700_000_000)\ndef f(completion): ...",
         "reward.memory_gib: 1 GiB"),
        ("import os\nos.environ['MY_TOKEN']\ndef f(completion): ...",
         "only if reward.env lists it"),
        ("import time\ntime.sleep(60)\ndef f(completion): ...", "reward.start_timeout"),
    ],
)  # fmt: skip
def test_file_that_cannot_be_loaded_is_told_the_true_reason(tmp_path, monkeypatch, source, part):
    monkeypatch.setenv("MY_TOKEN", "secret")
    path = reward_file(tmp_path, source)
    limits = Limits(memory_gib=1.0, start_timeout=3.0)
    check_start_error(
        lambda: RewardPool("python", path=f"{path}:f", workers=1, limits=limits), part
    )


def test_slow_start_is_told(tmp_path, pool_of, monkeypatch, capsys):
    monkeypatch.setattr("lorelei.reward.process.TELL_AFTER", 0.1)
    path = reward_file(tmp_path, "import time\ntime.sleep(1)\ndef f(completion): return 1")
    pool_of(path, "f", workers=1)
    assert "a worker has been starting for 0.1 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "given"),
    [
        ("HF_TOKEN", "x", False),
        ("OPENAI_API_KEY", "x", False),
        ("WANDB_API_KEY", "x", False),
        ("aws_session", "x", False),
        ("DB_PASSWORD", "x", False),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/x", False),
        ("SSH_AUTH_SOCK", "/x", False),
        ("DATABASE_URL", "postgres://me:secret@host/db", False),
        ("TOKENIZERS_PARALLELISM", "false", True),
        ("KEYBOARD", "us", True),
        ("SOME_URL", "http://host:80/x@y", True),
    ],
)
def test_secrets_of_the_environment_do_not_reach_rewards(monkeypatch, name, value, given):
    monkeypatch.setenv(name, value)
    environment, withheld = for_rewards()
    assert (name in environment, name in withheld) == (given, not given)
    assert for_rewards([name])[0][name] == value


def test_listed_secret_reaches_the_reward_and_a_missing_one_is_an_error(
    tmp_path, pool_of, monkeypatch
):
    monkeypatch.setenv("A_KEY", "4")
    monkeypatch.setenv("B_KEY", "5")
    source = "import os\ndef f(completion): return float(os.environ[completion])"
    path = reward_file(tmp_path, source)
    pool = pool_of(path, "f", workers=1, limits=Limits(env=("A_KEY",)))
    a, b = score(pool, "A_KEY", "B_KEY")
    assert a.value == 4.0
    assert b.error == "raised KeyError: 'B_KEY'; rewards get B_KEY only if reward.env lists it"
    check_start_error(
        lambda: RewardPool("python", path=f"{path}:f", limits=Limits(env=("NO_KEY",))),
        "reward.env",
        "'NO_KEY'",
    )


def test_sending_to_a_worker_that_does_not_read_has_the_same_deadline(tmp_path, pool_of):
    source = """
        import os, signal, threading
        def f(completion):
            if completion == "stop":
                threading.Timer(0.05, os.kill, [os.getpid(), signal.SIGSTOP]).start()
            return len(completion)
    """
    pool = pool_of(reward_file(tmp_path, source), "f", workers=1, timeout=1)
    assert score(pool, "stop")[0].value == 4
    time.sleep(0.3)
    started = time.monotonic()
    lost, good = score(pool, "x" * 1_000_000, "good")
    assert (lost.error, good.value) == ("timeout", 4)
    assert time.monotonic() - started < 20


def test_workers_and_what_they_started_end_with_a_trainer_that_is_killed(tmp_path):
    source = f"""
        import asyncio, os, sys, time
        from lorelei.reward.pool import RewardPool
        pool = RewardPool("python", path="{tmp_path / "daemons.py"}:f", workers=2)
        print([asyncio.run(pool.score({{}}, "")).value for _ in range(4)], flush=True)
        time.sleep(1000)
    """
    daemons = """
        import os, time
        def f(completion):
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    time.sleep(1000)
                os._exit(0)
            return 1.0
    """
    (tmp_path / "daemons.py").write_text(textwrap.dedent(daemons))
    mark = f"mark-{time.monotonic_ns()}"
    trainer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(source)],
        stdout=subprocess.PIPE,
        env={**os.environ, "LORELEI_TEST": mark},
    )
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == b"[1.0, 1.0, 1.0, 1.0]\n"

    def marked() -> list[Path]:
        every = Path("/proc").glob("[0-9]*/environ")
        return [p for p in every if mark.encode() in _read(p)]

    assert len(marked()) >= 1 + 2 * 2 + 4
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    assert eventually(lambda: not marked(), 10)


def test_reward_that_no_text_of_a_trial_satisfies_is_refused(tmp_path, pool_of):
    source = """
        import time
        def broken(completion, solution): return 1.0
        def picky(completion, answer): return {"7": 1.0}[completion]
        def slow(completion): time.sleep(100)
        def longest(completions, **columns): return [1.0, None]
    """
    path = reward_file(tmp_path, source)
    rows = [{"answer": "6"}, {"answer": "7"}]
    try_out(pool_of(path, "picky", workers=1), rows)
    try_out(pool_of(path, "longest", workers=1), rows)
    with pytest.raises(ValueError, match="no column 'solution' in the row; it has answer"):
        try_out(pool_of(path, "broken", workers=1), rows)
    with pytest.raises(ValueError, match=r"reward\.timeout: the first score took more than 0\.5 s"):
        try_out(pool_of(path, "slow", workers=1, timeout=0.5), rows)
