"""How an SGLang server is started, and what it must be able to do."""

from __future__ import annotations

from dataclasses import dataclass

from lorelei.config.errors import FieldError
from lorelei.config.rollout import Scalar
from lorelei.inference.server.backend import stream_seed
from lorelei.inference.server.client import READ_TIMEOUT, Client
from lorelei.inference.server.options import ServerOptions, binding, flags, launch
from lorelei.inference.server.process import LOOPBACK, Launch
from lorelei.inference.sglang.kind import INNER, SPARE, cpu_cache_tokens, slots
from lorelei.types import GenerateRequest

LAUNCHER = "lorelei.inference.sglang.in_server.launcher"


@dataclass(frozen=True, slots=True)
class SglangBackend:
    """Implements ServerBackend; options None: for servers that are attached to, not started."""

    options: ServerOptions | None
    read_timeout: float = READ_TIMEOUT
    name: str = "sglang"

    def launch(self, number: int, port: int, token: str, host: str = LOOPBACK) -> Launch:
        options = self.options
        assert options is not None, "attached servers are not started"
        check_model(options)
        own = {
            "TRANSFORMERS_OFFLINE": "1",
            "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",  # by SPARE
        }
        if options.device == "cpu":
            own |= {
                "SGLANG_USE_CPU_ENGINE": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "OMP_NUM_THREADS": str(options.threads),
            }
            if options.tensor_parallel > 1:  # else a worker for each NUMA node
                own["SGLANG_CPU_OMP_THREADS_BIND"] = binding(options, number)
        return launch(self.name, LAUNCHER, arguments(options, number, port, host), token, own)

    def seed(self, request: GenerateRequest) -> int:
        # our sampler counts positions from the start of the sequence, so that an interrupted
        # answer continues its stream
        return stream_seed(request.sampling.seed, request.key)

    async def workers(self, client: Client) -> int:
        how = f"start it with `python -P -m {LAUNCHER}`, Lorelei on its PYTHONPATH"
        found = await client.facts("SGLang", how)
        with client.reading():
            workers, adapts = int(found["workers"]), found["max_rank"] is not None
        if not adapts:
            raise ValueError(
                f"rollout.urls: {client.url} takes no adapters; {how}, and with --enable-lora "
                "--max-lora-rank and --lora-target-modules"
            )
        return workers


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
