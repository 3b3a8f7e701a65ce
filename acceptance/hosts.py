"""Training ranks on two hosts, the rollout server on a third, and a link that is cut.

usage: python -m acceptance hosts [CASE ...]
The hosts are network namespaces of this machine, joined by a switch; making them takes root.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from acceptance.record import Line
from acceptance.table import table
from benchmarks.cases import MODEL
from lorelei.cache import cache_folder
from lorelei.model.locate import resolve_model
from lorelei.model.tokenizer import load_tokenizer
from lorelei.obs.history import read_metrics
from lorelei.store.manifest import manifest_paths
from tests.hosts import Host, Hosts
from tests.tiny_models import make_tiny

STEPS, CUT_AFTER, CUT = 5, 2, 20.0  # seconds
REWARD = "def vowels(completion, **row):\n    return sum(c in 'aeiou ' for c in completion)\n"
PORT, HEAD = 30100, 6379
DEADLINE = 300.0  # seconds for any stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Who is where, how versions travel, and which link is cut."""

    engine: str
    publisher: str
    server: Literal["attached", "ray"]  # started there by hand, or by Ray
    cut: Literal["", "trainer", "server"]  # whose link
    train: str = "archon"


# how the train engine is split over the two hosts
TRAIN = {
    "archon": {"workers": 2},
    "megatron": {"kind": "megatron", "tensor_parallel": 2},
}
CASES = {
    "sglang-xccl": Case(engine="sglang", publisher="xccl", server="attached", cut=""),
    "sglang-http": Case(engine="sglang", publisher="http", server="attached", cut=""),
    "sglang-xccl-ray": Case(engine="sglang", publisher="xccl", server="ray", cut=""),
    "sglang-xccl-cut-trainer": Case(
        engine="sglang", publisher="xccl", server="attached", cut="trainer"
    ),
    "sglang-xccl-cut-server": Case(
        engine="sglang", publisher="xccl", server="attached", cut="server"
    ),
    "vllm-xccl": Case(engine="vllm", publisher="xccl", server="attached", cut=""),
    "vllm-xccl-ray": Case(engine="vllm", publisher="xccl", server="ray", cut=""),
    "sglang-xccl-megatron": Case(
        engine="sglang", publisher="xccl", server="attached", cut="", train="megatron"
    ),
}


async def measure(case: Case) -> Line:
    """One row."""
    with tempfile.TemporaryDirectory() as folder, Hosts(3) as hosts:
        return _Trial(case, Path(folder), hosts).run()


class _Trial:
    """One case on three hosts."""

    def __init__(self, case: Case, place: Path, hosts: Hosts) -> None:
        self._case, self._place = case, place
        self._first, self._second, self._third = hosts.all
        self._folder = place / "runs" / "run"
        token = secrets.token_hex(16)
        self._environment: Mapping[str, str] = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": os.environ["HOME"],
            "LORELEI_CACHE": str(cache_folder()),
            "PYTHONPATH": str(Path.cwd()),
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ADDRESS": f"{self._first.address}:{HEAD}",
            "LORELEI_SERVER_TOKEN": token,
        }

    def run(self) -> Line:
        self._write()
        with ExitStack() as stack:
            self._start_ray(stack)
            if self._case.server == "attached":
                self._start(
                    stack,
                    self._third,
                    *("lorelei", "rollout", "run.yaml"),
                    *(f"--host={self._third.address}", f"--port={PORT}"),
                )
            began = time.monotonic()
            run = self._start(stack, self._first, "lorelei", "train", "run.yaml", *self._where())
            cut = self._cut_link(run) if self._case.cut else {}
            self._until(lambda: run.poll() is not None, "the run does not end")
            outcome = "went on"
            if run.returncode != 0:
                outcome = "stopped and resumed"
                run = self._start(stack, self._first, "lorelei", "resume", "runs/run")
                self._until(lambda: run.poll() is not None, "the resumed run does not end")
            return self._line(outcome, run.returncode) | {
                "seconds": round(time.monotonic() - began, 1),
                **cut,
            }

    def _line(self, outcome: str, code: int) -> Line:
        (steps,) = read_metrics(self._folder / "metrics.jsonl").steps.values()
        log = (self._place / "log.txt").read_text()
        errors = [line for line in log.splitlines() if line.startswith("error: ")]
        problems: list[str] = []
        if code != 0 or len(steps) != STEPS:
            problems.append(f"exit status {code} after {len(steps)} of {STEPS} steps: {log[-500:]}")
        if "Traceback" in log:
            problems.append("the log has a traceback")
        if outcome != "went on" and len(errors) != 1:
            problems.append(f"{len(errors)} lines say why it stopped")
        return {
            "steps": len(steps),
            "step_s": round(sum(s.step_seconds for s in steps) / max(len(steps), 1), 2),
            "longest_step_s": round(max((s.step_seconds for s in steps), default=0.0), 2),
            "kl_sampler": max((s.kl_sampler for s in steps), default=0.0),
            "restarts": log.count("; restart "),
            "outcome": outcome,
            "said": [line for line in log.splitlines() if "warning: " in line] + errors,
            "problems": problems,
        }

    def _cut_link(self, run: subprocess.Popen[str]) -> Line:
        self._until(
            lambda: run.poll() is not None or self._committed() >= CUT_AFTER, "no step is committed"
        )
        host = self._second if self._case.cut == "trainer" else self._third
        host.unplug()
        time.sleep(CUT)
        late, during = run.poll() is not None, self._committed()
        host.plug()
        assert not late, "the run was over before the link was cut"
        return {"cut_s": CUT, "steps_during_the_cut": during - CUT_AFTER}

    def _committed(self) -> int:
        return max([int(path.stem) for path in manifest_paths(self._folder)], default=-1)

    def _start_ray(self, stack: ExitStack) -> None:
        shared = ("--num-cpus=1", "--object-store-memory=100000000", "--block")
        head = ("--head", f"--port={HEAD}", "--include-dashboard=false")
        joins = (f"--address={self._environment['RAY_ADDRESS']}",)
        on_ray = [(self._first, head), (self._second, joins)]
        if self._case.server == "ray":
            on_ray.append((self._third, joins))
        for host, role in on_ray:
            address = f"--node-ip-address={host.address}"
            self._start(stack, host, "-m", "ray.scripts.scripts", "start", *role, address, *shared)
            if host is self._first:
                self._wait_for(host, HEAD)

    def _wait_for(self, host: Host, port: int) -> None:
        def answers() -> bool:
            probe = f"import socket; socket.create_connection(('{host.address}', {port}), 1)"
            try:
                host.run(sys.executable, "-c", probe)
            except subprocess.CalledProcessError:
                return False
            return True

        self._until(answers, f"nobody answers at {host.address}:{port}")

    def _until(self, reached: Callable[[], bool], otherwise: str) -> None:
        deadline = time.monotonic() + DEADLINE
        while not reached():
            if time.monotonic() > deadline:
                log = (self._place / "log.txt").read_text()
                raise TimeoutError(f"{otherwise} within {DEADLINE:g} s:\n{log[-5000:]}")
            time.sleep(0.1)

    def _start(self, stack: ExitStack, host: Host, *words: str) -> subprocess.Popen[str]:
        """A Python command there; all write to one log. It ends with its host."""
        module = ("-m",) if words[0] == "lorelei" else ()
        log = stack.enter_context((self._place / "log.txt").open("a"))
        return host.start([sys.executable, *module, *words], self._environment, self._place, log)

    def _where(self) -> tuple[str, ...]:
        if self._case.server == "ray":
            return ()
        return (f"rollout.urls=http://{self._third.address}:{PORT}",)

    def _write(self) -> None:
        tokenizer = load_tokenizer(resolve_model(MODEL))
        model = make_tiny("llama", self._place / "model", vocab_size=len(tokenizer))
        tokenizer.save_pretrained(model)
        rows = [json.dumps({"question": f"Say {n}.", "answer": str(n)}) for n in range(64)]
        (self._place / "rows.jsonl").write_text("\n".join(rows) + "\n")
        reward = (
            "def vowels(completion, **row):\n    return sum(c in 'aeiou ' for c in completion)\n"
        )
        (self._place / "rewards.py").write_text(reward)
        config = {
            "name": "run",
            "model": "./model",
            "steps": STEPS,
            "threads": 1,
            "lora": {"lora_rank": 8, "lora_alpha": 16},
            "train": TRAIN[self._case.train],
            "cluster": {"kind": "ray", "spread": "strict", "wait": 120},
            "rollout": {
                "kind": self._case.engine,
                "n_samples": 4,
                "max_new_tokens": 48,
                "max_context": 256,
                "max_running": 16,
            },
            "publish": {"kind": self._case.publisher},
            "task": {"kind": "jsonl", "path": "rows.jsonl"},
            "reward": {"kind": "python", "path": "rewards.py:vowels", "workers": 1},
            "algo": {"batch_size": 2, "lr": 1e-3},
            "eval": {"every": 0},
        }
        (self._place / "run.yaml").write_text(yaml.safe_dump(config))


COLUMNS = (
    "train",
    "rollouts",
    "publisher",
    "server started",
    "link cut for 20 s",
    "steps",
    "step, s",
    "longest step, s",
    "restarts of workers",
    "outcome",
)


def section(found: Mapping[str, Line]) -> str:
    """Its part of docs/acceptance.md."""
    rows = [
        (
            *(CASES[name].train, CASES[name].engine, CASES[name].publisher),
            "by Ray" if CASES[name].server == "ray" else "by hand",
            {"": "none", "trainer": "a train worker's", "server": "the server's"}[CASES[name].cut],
            row["steps"],
            f"{row['step_s']:.2f}",
            f"{row['longest_step_s']:.1f}",
            row["restarts"],
            row["outcome"],
        )
        for name, row in found.items()
    ]
    return f"""## Three hosts

{STEPS} steps on a tiny model with the canary on: one of two train ranks on each of two hosts (Ray),
the rollout server on a third. `archon` is data-parallel, `megatron` tensor-parallel. The hosts are
network namespaces of this machine with veth pairs to a switch; a link is cut at the switch after
step {CUT_AFTER}, for {CUT:g} s.

`make acceptance ARGS=hosts`, as root

{table(COLUMNS, rows)}
"""
