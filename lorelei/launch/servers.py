"""The engine of inference servers, built from a run's configuration."""

from __future__ import annotations

import ipaddress
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

from lorelei.config.rollout import AnyServer
from lorelei.config.run import RunConfig
from lorelei.inference.kinds import SERVERS
from lorelei.inference.limits import Limits
from lorelei.inference.server.engine import ServerEngine
from lorelei.inference.server.options import ServerOptions, largest_rank, versions_in_use
from lorelei.inference.server.process import LocalServer
from lorelei.lora.targets import match_targets
from lorelei.model.config import ModelInfo
from lorelei.model.load import read_config
from lorelei.model.locate import resolve_model
from lorelei.plan.hardware import has_accelerator
from lorelei.plan.model_info import model_info

if TYPE_CHECKING:
    from lorelei.launch.ray_cluster import Cluster
    from lorelei.model.tokenizer import Tokenizer

TOKEN = "LORELEI_SERVER_TOKEN"

Device = Literal["cpu", "cuda"]


def make_server_engine(
    config: RunConfig,
    rollout: AnyServer,
    folder: Path,
    model: ModelInfo,
    tokenizer: Tokenizer,
    logs: Path,
    cluster: Cluster | None,
) -> ServerEngine:
    """Not started yet. folder: of the model. logs: a folder for what the servers print.

    cluster: where they are started; None: on this machine.
    """
    context = model.sizes.context(rollout.max_context)
    options = None
    if not rollout.urls:
        device = device_here() if cluster is None else "cuda" if cluster.gpus else "cpu"
        options = server_options(config, rollout, folder, model, device)
    return ServerEngine(
        SERVERS[rollout.kind].backend(options),
        Limits(vocab=model.sizes.vocab, context=context, decodes_text=True),
        logs,
        tokenizer=tokenizer,
        replicas=rollout.replicas,
        urls=rollout.urls,
        token=os.environ.get(TOKEN),
        max_running=rollout.max_running,
        launcher=cluster.start if cluster else LocalServer,
    )


def serve(config: RunConfig, host: str, port: int) -> NoReturn:
    """Become the inference server of a run. Raises ValueError for user-fixable errors."""
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
    options = server_options(config, rollout, folder, model, device_here())
    launch = SERVERS[rollout.kind].backend(options).launch(0, port, token, host)
    os.execvpe(launch.command[0], launch.command, {**os.environ, **launch.environment})


def device_here() -> Device:
    return "cuda" if has_accelerator() else "cpu"


def server_options(
    config: RunConfig,
    rollout: AnyServer,
    folder: Path,
    model: ModelInfo,
    device: Device,
) -> ServerOptions:
    """What a server of the run is started with. folder: of the model."""
    return ServerOptions(
        model=folder,
        sizes=model.sizes,
        dtype=config.dtype,
        context=model.sizes.context(rollout.max_context),
        max_rank=largest_rank(config, rollout),
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
