"""Whole runs on a tiny random model, small enough to train in a second."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from transformers import PreTrainedTokenizerFast

from lorelei.cli.trained_run import TrainedRun
from tests.fork_server import ENVIRONMENT, ForkServer
from tests.tiny_models import make_tiny

# rewards that differ between random completions, so that every step has a gradient
REWARD = """
def vowels(completion, **row):
    share = sum(c in "aeiou " for c in completion) / max(len(completion), 1)
    return share, {"length": len(completion)}
"""
SECONDS = 120  # for a command


def make_workplace(folder: Path, tokenizer: PreTrainedTokenizerFast, family: str = "llama") -> Path:
    """A folder with model/, rows.jsonl and rewards.py, for runs to be started in."""
    tokenizer.save_pretrained(make_tiny(family, folder / "model"))
    (folder / "rewards.py").write_text(REWARD)
    write_rows(folder)
    return folder


def write_rows(folder: Path) -> None:
    """64 problems, as rows.jsonl."""
    rows = [{"question": f"Say the number {n}.", "answer": str(n)} for n in range(64)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def tiny_run(**sections: Any) -> dict[str, Any]:
    """A configuration; a mapping in `sections` is merged into the section of its name and kind."""
    config: dict[str, Any] = {
        "model": "./model",
        "steps": 3,
        "threads": 1,
        "lora": {"lora_rank": 4, "lora_alpha": 8},
        "rollout": {"n_samples": 4, "max_new_tokens": 8},
        "task": {"kind": "jsonl", "path": "rows.jsonl"},
        "reward": {"kind": "python", "path": "rewards.py:vowels", "workers": 1},
        "algo": {"lr": 1.0e-2, "batch_size": 2},
        "eval": {"every": 2, "n_prompts": 4},
    }
    for name, value in sections.items():
        if value is None:
            config.pop(name, None)
            continue
        below = config.get(name, {})
        both = isinstance(value, Mapping) and value.get("kind", below.get("kind")) == below.get(
            "kind"
        )
        config[name] = {**below, **value} if both else value
    return config


def write_run(folder: Path, name: str, /, **sections: Any) -> Path:
    """The configuration as a YAML file of a workplace."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tiny_run(**sections), sort_keys=False))
    return path


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """`lorelei ...` as users start it, in a workplace."""
    return subprocess.Popen(
        [sys.executable, "-m", "lorelei", *arguments],
        cwd=folder,
        env={**ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def lorelei(
    folder: Path, *arguments: str, code: int = 0, errors: bool = False, **environment: str
) -> str:
    """What a command prints; it must leave with `code`. errors: what it says beside it, too."""
    with TemporaryDirectory() as place:
        files = [Path(place) / name for name in ("out", "errors")]
        where = {"folder": folder, "out": files[0], "errors": files[1]}
        pid = _commands().begin(*arguments, **where, environment=environment)
        if not _commands().ended(SECONDS):
            os.kill(pid, signal.SIGKILL)
        left = _commands().code()
        out, said = (file.read_text() for file in files)
    assert left == code, f"{arguments}: {left}\n{out}\n{said}"
    if errors:
        return out + said
    return out if code == 0 else said


@cache
def _commands() -> ForkServer:
    """Of this process; it ends with it."""
    return ForkServer()


def final(folder: Path) -> str:
    """Where a finished run has its adapter and Adam's moments: the name holds step and sha256."""
    manifest = TrainedRun.read(folder).manifest
    assert manifest.state["finished"] is True
    return manifest.adapters["default"].snapshot


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl of one kind."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]
