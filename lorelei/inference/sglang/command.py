"""SGLang's command line, derived from the run."""

from __future__ import annotations

import sys

from lorelei.config.errors import FieldError
from lorelei.config.rollout import Scalar
from lorelei.inference.server.options import ServerOptions, binding, flags
from lorelei.inference.server.process import LOOPBACK, Launch
from lorelei.inference.sglang.kind import INNER, SPARE, cpu_cache_tokens, slots
from lorelei.venvs.recipe import import_path, interpreter

LAUNCHER = "lorelei.inference.sglang.in_server.launcher"


def launch(
    options: ServerOptions, number: int, port: int, token: str, host: str = LOOPBACK
) -> Launch:
    """The command and environment of replica `number`. Raises ValueError without `make sglang`."""
    check_model(options)
    python = interpreter("sglang")
    return Launch(
        # -P: no module of the folder that we happen to be in is taken for the server's
        command=(str(python), "-P", "-m", LAUNCHER, *arguments(options, number, port, host)),
        environment=_environment(options, number, token),
    )


def check_model(options: ServerOptions) -> None:
    """Raises FieldError for adapters that would crash the server."""
    inner = {*INNER} & {*options.target_modules}
    if options.device == "cpu" and inner and options.sizes.moe is not None:
        raise FieldError(
            "lora.target_modules",
            f"{', '.join(sorted(inner))} of a mixture of experts crash SGLang's CPU server at its "
            "first request; target q_proj, k_proj, v_proj and o_proj only, or use "
            "rollout: {kind: embedded}",
        )


def arguments(
    options: ServerOptions, number: int, port: int, host: str = LOOPBACK
) -> tuple[str, ...]:
    """The server's command line behind the launcher."""
    room = slots(options.versions, options.max_rank)
    derived: dict[str, Scalar] = {
        "model-path": str(options.model),
        "dtype": options.dtype,
        "device": options.device,
        "host": host,
        "port": port,
        "context-length": options.context + SPARE,
        "max-running-requests": options.max_running,
        "tp-size": options.tensor_parallel,
        "enable-lora": True,
        "max-lora-rank": room.rank,
        "max-loras-per-batch": room.versions,
        "skip-tokenizer-init": not options.has_tokenizer,
        "enable-memory-saver": options.device != "cpu",
        "sampling-backend": "pytorch",  # where our sampler is
        "grammar-backend": "none",
        "sleep-on-idle": True,
        "log-level-http": "warning",
    }
    if options.device != "cpu":
        derived["base-gpu-id"] = number * options.tensor_parallel
    else:
        derived["attention-backend"] = "torch_native"
        derived["lora-backend"] = "torch_native"
        derived["mem-fraction-static"] = 0.3
        derived["max-total-tokens"] = cpu_cache_tokens(
            *(options.sizes, options.dtype, options.context),
            *(options.max_running, options.cpu_cache_gib),
        )
    words = flags({**derived, **options.extra_args})
    return (*words, "--lora-target-modules", *options.target_modules)


def _environment(options: ServerOptions, number: int, token: str) -> dict[str, str]:
    found = {
        "LORELEI_SERVER_TOKEN": token,
        "PYTHONPATH": str(import_path()),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",  # by SPARE
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    }
    if options.device == "cpu":
        found |= {
            "SGLANG_USE_CPU_ENGINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": str(options.threads),
        }
        if options.tensor_parallel > 1:  # else a worker for each NUMA node
            found["SGLANG_CPU_OMP_THREADS_BIND"] = binding(options, number)
    return found
