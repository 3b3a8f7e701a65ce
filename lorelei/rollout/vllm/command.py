"""vLLM's command line, derived from the run."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lorelei.config.vllm_options import rank_at_least
from lorelei.interpreters.recipe import import_path, interpreter
from lorelei.rollout.server.process import LOOPBACK, Launch

# not lm_head: vLLM's scores of prompts fail beside an adapted one
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGETS = (*ATTENTION, "gate_proj", "up_proj", "down_proj", "experts")
LOGPROBS_MODE = "processed_logprobs"
EXTENSION = "lorelei.rollout.vllm.extension.Extension"
ROUTES = "lorelei.rollout.vllm.routes.Routes"

Scalar = str | int | float | bool


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmOptions:
    """What a server is started with."""

    model: Path
    dtype: str
    context: int  # most tokens of a sequence
    max_rank: int  # of the adapters to come
    versions: int  # adapter versions that may be in use at once
    max_running: int
    tensor_parallel: int
    device: str  # "cpu" or "cuda"
    has_tokenizer: bool
    threads: int  # of one process, on a CPU
    cpu_cache_gib: int  # for keys and values, on a CPU
    extra_args: Mapping[str, Scalar]


def launch(
    options: VllmOptions, number: int, port: int, token: str, host: str = LOOPBACK
) -> Launch:
    """The command and environment of replica `number`. Raises ValueError without `make vllm`."""
    python = interpreter("vllm")
    return Launch(
        command=(str(python), "-m", "vllm.entrypoints.cli.main", *arguments(options, port, host)),
        environment=_environment(options, number, token),
    )


def arguments(options: VllmOptions, port: int, host: str = LOOPBACK) -> tuple[str, ...]:
    """`serve MODEL ...`, as for the `vllm` command."""
    derived: dict[str, Scalar] = {
        "host": host,
        "port": port,
        "served-model-name": "base",
        "dtype": options.dtype,
        "max-model-len": options.context + 1,  # the token that ends a score
        "max-num-seqs": options.max_running,
        "tensor-parallel-size": options.tensor_parallel,
        "enable-lora": True,
        "max-lora-rank": rank_at_least(options.max_rank),
        "max-loras": options.versions,
        "max-cpu-loras": options.versions,
        "logprobs-mode": LOGPROBS_MODE,
        "worker-extension-cls": EXTENSION,
        "middleware": ROUTES,
        "disable-uvicorn-access-log": True,
        "generation-config": "vllm",
        "skip-tokenizer-init": not options.has_tokenizer,
        "enable-sleep-mode": options.device != "cpu",
    }
    if options.device == "cpu":
        derived["block-size"] = 32
        derived["enforce-eager"] = True  # compiling takes longer than it saves
    words = ["serve", str(options.model)]
    for name, value in {**derived, **options.extra_args}.items():
        words += _flag(name, value)
    return (*words, "--lora-target-modules", *_targets(options))


def _targets(options: VllmOptions) -> tuple[str, ...]:
    """What may be adapted. On a CPU vLLM ends at its start where experts may be."""
    path = options.model / "config.json"
    if options.device != "cpu" or not path.is_file():
        return TARGETS
    config = json.loads(path.read_text(encoding="utf-8"))
    return TARGETS if {"num_experts", "num_local_experts"}.isdisjoint(config) else ATTENTION


def _flag(name: str, value: Scalar) -> list[str]:
    flag = "--" + name.strip("-").replace("_", "-")
    if value is True:
        return [flag]
    if value is False:
        return []
    return [flag, str(value)]


def _environment(options: VllmOptions, number: int, token: str) -> dict[str, str]:
    found = {
        "LORELEI_SERVER_TOKEN": token,
        "VLLM_API_KEY": token,  # guards vLLM's own routes
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "0",  # the extension is written for the other one
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # by the one token that ends a score
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(import_path()),
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    }
    if options.device == "cpu":
        found |= {
            "VLLM_CPU_KVCACHE_SPACE": str(options.cpu_cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": _binding(options, number),
            "OMP_NUM_THREADS": str(options.threads),
            "CUDA_VISIBLE_DEVICES": "",
        }
    return found


def _binding(options: VllmOptions, number: int) -> str:
    """Cores of each worker, as vLLM writes them. Unbound, all servers would sit on core 0."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    workers = range(number * options.tensor_parallel, (number + 1) * options.tensor_parallel)
    # from the last core down: the trainer starts at the first
    own = [
        [cores[-1 - (worker * options.threads + n) % len(cores)] for n in range(options.threads)]
        for worker in workers
    ]
    return "|".join(",".join(map(str, sorted(set(each)))) for each in own)
