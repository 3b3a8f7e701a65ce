"""A run over a server that it started itself: the server is killed, then the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from lorelei.inference.server.process import GRACE
from lorelei.inference.server.process_guard import descendants
from lorelei.store.check import check_run
from tests.chaos.test_kill import committed, prompts
from tests.contract.servers import ATTENTION
from tests.environments import needs
from tests.processes import wait_gone
from tests.tiny_runs import ENVIRONMENT, make_workplace, records, write_run

STALENESS = 1
START = 240.0  # seconds for a server on a busy machine


@needs("vllm")
def test_a_run_outlives_its_server_and_no_process_outlives_the_run(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """The attention of a mixture of experts over vLLM, published by broadcast."""
    place = make_workplace(tmp_path, tiny_tokenizer, "qwen3_moe")
    sections: dict[str, Any] = {
        "steps": 30,
        "lora": {"target_modules": list(ATTENTION)},
        "rollout": {
            "kind": "vllm",
            "n_samples": 4,
            "max_new_tokens": 8,
            "max_head_offpolicyness": STALENESS,
            "cpu_cache_gib": 1,
            "max_running": 8,
        },
        "publish": {"kind": "xccl", "timeout": 30},
        "eval": {"every": 0},
    }
    write_run(place, "run", **sections)
    folder = place / "runs/run"
    with (place / "log.txt").open("w") as log:
        run = subprocess.Popen(
            [sys.executable, "-m", "lorelei", "train", "run.yaml"],
            cwd=place,
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # a group of its own
        )
    try:
        wait(run, log.name, lambda: committed(folder) >= 2)
        (api,) = servers(run.pid)
        first = [api, *descendants(api)]
        os.kill(api, signal.SIGKILL)
        assert wait_gone(first), "the first server has left something"
        before = committed(folder)
        wait(run, log.name, lambda: committed(folder) >= before + 3)
        assert servers(run.pid) != [api]
        everything = [run.pid, *descendants(run.pid)]
        groups = {os.getpgid(pid) for pid in everything if Path(f"/proc/{pid}").exists()}
        run.kill()
    finally:
        run.kill()
        run.wait()
    assert wait_gone(everything, 3 * GRACE)
    assert [pid for pid, group in processes() if group in groups] == []
    left = check_run(folder)
    assert all("left over from a crash" in line or "cut off" in line for line in left), left
    trained = prompts(folder)
    assert len(trained) == len(set(trained)), "a prompt was trained on twice"
    steps = records(folder, "step")
    assert all(step["staleness_max"] <= STALENESS for step in steps)
    assert all(step["canary_version"] < 1e-5 < step["canary_base"] for step in steps)
    assert steps[1]["publish_fallbacks"] == 0, "a group with the worker"
    assert steps[-1]["publish_fallbacks"] == steps[-2]["publish_fallbacks"] <= 1, "and a new one"
    output = (folder / "logs/vllm-0.log").read_text()
    assert output.count("$ ") >= 2, "both starts are in the run's folder"


def servers(pid: int) -> list[int]:
    """The servers of a run: what its process guards have started."""
    guards = [below for below in descendants(pid) if "process_guard.py" in command(below)]
    return [int(child) for guard in guards for child in children(guard)]


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def processes() -> list[tuple[int, int]]:
    """(pid, process group) of everything that runs."""
    found: list[tuple[int, int]] = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            found.append((int(entry.name), os.getpgid(int(entry.name))))
        except ProcessLookupError:
            continue
    return found


def wait(run: subprocess.Popen[bytes], log: str, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START
    while not condition():
        assert run.poll() is None and time.monotonic() < deadline, Path(log).read_text()[-3000:]
        time.sleep(0.02)
