"""What a server is started with, whichever kind it is, and what it would crash on. No torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorelei.config.errors import ConfigError
from lorelei.config.rollout import AnyServer, Scalar
from lorelei.config.run import RunConfig
from lorelei.inference.server.process import Launch
from lorelei.model.config import ModelSizes
from lorelei.venvs.recipe import import_path, interpreter


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Follows from a run; `extra_args` are the server's own options, by its own names."""

    model: Path
    sizes: ModelSizes
    dtype: str
    context: int  # most tokens of a sequence
    max_rank: int  # of the adapters to come
    target_modules: tuple[str, ...]  # last names of linear layers, for SGLang
    versions: int  # adapter versions that may be in use at once
    max_running: int
    tensor_parallel: int
    device: str  # "cpu" or "cuda"
    has_tokenizer: bool
    threads: int  # of one process, on a CPU
    cpu_cache_gib: int  # for keys and values, on a CPU
    extra_args: Mapping[str, Scalar]


def largest_rank(config: RunConfig, rollout: AnyServer) -> int:
    """Of any adapter that a server may get."""
    return max(rollout.reserve_rank, *(e.lora.lora_rank for e in config.experiments()))


def versions_in_use(config: RunConfig) -> int:
    """Adapter versions that may be sampled from at once, and one that is being published."""
    return sum(e.rollout.max_head_offpolicyness + 2 for e in config.experiments())


def check_server(
    rollout: AnyServer, kind: str, model: ModelSizes, modules: Sequence[str], cpu_experts: str
) -> None:
    """What every kind of server would ignore or crash on, known before anything starts.

    cpu_experts: what the kind does with adapted experts on a CPU; empty: not on a CPU.

    Raises ConfigError with the reason.
    """
    experts = next((name for name in modules if ".experts." in name), None)
    if experts is not None and cpu_experts:
        raise ConfigError(
            f"lora.target_modules: {experts} is of an expert, and {kind} on a CPU {cpu_experts}; "
            "target q_proj, k_proj, v_proj and o_proj only, or use rollout.kind: embedded"
        )
    if "lm_head" in modules:
        raise ConfigError(
            f"lora.target_modules: lm_head cannot be adapted with rollout.kind {kind}; "
            "leave it out, or use rollout.kind: embedded"
        )
    if model.heads % rollout.tensor_parallel_size:
        raise ConfigError(
            f"rollout.tensor_parallel_size: {rollout.tensor_parallel_size} processes cannot share "
            f"{model.heads} attention heads; use a divisor"
        )


def flags(options: Mapping[str, Scalar]) -> list[str]:
    """Words of a command line; a False leaves its option out."""
    words: list[str] = []
    for name, value in options.items():
        if value is not False:
            words.append("--" + name.strip("-").replace("_", "-"))
        if not isinstance(value, bool):
            words.append(str(value))
    return words


def binding(options: ServerOptions, number: int) -> str:
    """Cores of each worker of replica `number`, as both kinds of server write them: 0,1|2,3."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    workers = range(number * options.tensor_parallel, (number + 1) * options.tensor_parallel)
    # from the last core down: the trainer starts at the first
    own = [
        [cores[-1 - (worker * options.threads + n) % len(cores)] for n in range(options.threads)]
        for worker in workers
    ]
    return "|".join(",".join(map(str, sorted(set(each)))) for each in own)


def launch(
    kind: str, module: str, arguments: Iterable[str], token: str, own: Mapping[str, str]
) -> Launch:
    """`python -m module arguments` in the virtual environment of a kind of server.

    own: environment variables of the kind. Raises ValueError without `make KIND`.
    """
    return Launch(
        # -P: no module of the folder that we happen to be in is taken for the server's
        command=(str(interpreter(kind)), "-P", "-m", module, *arguments),
        environment={
            "LORELEI_SERVER_TOKEN": token,
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(import_path()),
            "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
            **own,
        },
    )
