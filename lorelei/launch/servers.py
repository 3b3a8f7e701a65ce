"""The engine of rollout servers, built from a run's configuration."""

from __future__ import annotations

import ipaddress
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

from lorelei.config.rollout import SglangRollout, VllmRollout
from lorelei.config.run import RunConfig
from lorelei.inference.limits import Limits
from lorelei.inference.server.backend import ServerBackend
from lorelei.inference.server.engine import ServerEngine
from lorelei.inference.server.launcher import LOCAL, Launcher
from lorelei.inference.server.options import ServerOptions
from lorelei.lora.targets import match_targets
from lorelei.model.config import ModelInfo
from lorelei.model.load import read_config
from lorelei.model.locate import resolve_model
from lorelei.plan.hardware import has_accelerator
from lorelei.plan.model_info import model_info

if TYPE_CHECKING:
    from lorelei.model.tokenizer import Tokenizer

TOKEN = "LORELEI_SERVER_TOKEN"

Device = Literal["cpu", "cuda"]


def make_server_engine(
    config: RunConfig,
    rollout: VllmRollout | SglangRollout,
    folder: Path,
    model: ModelInfo,
    tokenizer: Tokenizer,
    logs: Path,
    place: Launcher = LOCAL,
    device: Device | None = None,
) -> ServerEngine:
    """Not started yet. folder: of the model. logs: a folder for what the servers print.

    place: where they are started. device: of that place; none: this machine's.
    """
    sizes = model.sizes
    context = min(rollout.max_context or sizes.max_positions, sizes.max_positions)
    return ServerEngine(
        _backend(config, rollout, folder, model, device or device_here()),
        Limits(vocab=sizes.vocab, context=context, decodes_text=True),
        logs,
        tokenizer=tokenizer,
        replicas=rollout.replicas,
        urls=rollout.urls,
        token=os.environ.get(TOKEN),
        max_running=rollout.max_running,
        place=place,
    )


def serve(config: RunConfig, host: str, port: int) -> NoReturn:
    """Become the rollout server of a run. Raises ValueError for a user-fixable error."""
    rollout = config.rollout
    if rollout.kind == "embedded":
        raise ValueError("rollout.kind: 'embedded' is no server; use vllm or sglang")
    token = os.environ.get(TOKEN, "")
    if not token and not ipaddress.ip_address(socket.gethostbyname(host)).is_loopback:
        raise ValueError(
            f"--host: {host} is reached by others and {TOKEN} is not set; whoever reaches the "
            "server could replace its adapters. Set the same secret here and at the trainer"
        )
    folder = resolve_model(config.model)
    model = model_info(config, folder, read_config(folder))
    rollout = rollout.model_copy(update={"urls": ()})
    backend = _backend(config, rollout, folder, model, device_here())
    launch = backend.launch(0, port, token, Path.cwd(), host)
    os.execvpe(launch.command[0], launch.command, {**os.environ, **launch.environment})


def max_rank(config: RunConfig, rollout: VllmRollout | SglangRollout) -> int:
    """Of any adapter that a server may get."""
    return max(rollout.reserve_rank, *(e.lora.lora_rank for e in config.experiments()))


def versions_in_use(config: RunConfig) -> int:
    """Adapter versions that may be sampled from at once, and one that is being published."""
    return sum(e.rollout.max_head_offpolicyness + 2 for e in config.experiments())


def device_here() -> Device:
    return "cuda" if has_accelerator() else "cpu"


def _backend(
    config: RunConfig,
    rollout: VllmRollout | SglangRollout,
    folder: Path,
    model: ModelInfo,
    device: Device,
) -> ServerBackend:
    options = None if rollout.urls else _options(config, rollout, folder, model, device)
    match rollout:
        case VllmRollout():
            from lorelei.inference.vllm.backend import VllmBackend

            return VllmBackend(options)
        case SglangRollout():
            from lorelei.inference.sglang.backend import SglangBackend

            return SglangBackend(options)


def _options(
    config: RunConfig,
    rollout: VllmRollout | SglangRollout,
    folder: Path,
    model: ModelInfo,
    device: Device,
) -> ServerOptions:
    sizes = model.sizes
    context = min(rollout.max_context or sizes.max_positions, sizes.max_positions)
    return ServerOptions(
        model=folder,
        sizes=sizes,
        dtype=config.dtype,
        context=context,
        max_rank=max_rank(config, rollout),
        target_modules=projections(config, model),
        versions=versions_in_use(config),
        max_running=rollout.max_running,
        tensor_parallel=rollout.tensor_parallel_size,
        device=device,
        has_tokenizer=True,
        threads=rollout.threads,
        cpu_cache_gib=rollout.cpu_cache_gib,
        extra_args=rollout.extra_args,
    )


def projections(config: RunConfig, model: ModelInfo) -> tuple[str, ...]:
    """The last names of the linear layers that any adapter has, such as q_proj."""
    names = model.linears
    targets = {
        name
        for e in config.experiments()
        for name in match_targets(names, e.lora.spec(), config.model)
    }
    return tuple(dict.fromkeys(n.rsplit(".", 1)[-1] for n in names if n in targets))
