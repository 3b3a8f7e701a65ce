"""How a vLLM server is started, and what it must be able to do."""

from __future__ import annotations

from dataclasses import dataclass

from lorelei.config.rollout import Scalar
from lorelei.inference.server.backend import stream_seed
from lorelei.inference.server.client import READ_TIMEOUT, Client
from lorelei.inference.server.options import ServerOptions, binding, flags, launch
from lorelei.inference.server.process import LOOPBACK, Launch
from lorelei.inference.vllm.kind import slots
from lorelei.types import GenerateRequest

# not lm_head: vLLM's scores of prompts fail beside an adapted one
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGETS = (*ATTENTION, "gate_proj", "up_proj", "down_proj", "experts")
LOGPROBS_MODE = "processed_logprobs"
EXTENSION = "lorelei.inference.vllm.extension.Extension"
ROUTES = "lorelei.inference.vllm.routes.Routes"
LAUNCHER = "lorelei.inference.vllm.launcher"


@dataclass(frozen=True, slots=True)
class VllmBackend:
    """Implements ServerBackend; options None: for servers that are attached to, not started."""

    options: ServerOptions | None
    read_timeout: float = READ_TIMEOUT
    name: str = "vllm"

    def launch(self, number: int, port: int, token: str, host: str = LOOPBACK) -> Launch:
        options = self.options
        assert options is not None, "attached servers are not started"
        own = {
            "VLLM_API_KEY": token,  # guards vLLM's own routes
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_USE_V2_MODEL_RUNNER": "0",  # the extension is written for the other one
            "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # by the one token that ends a score
        }
        if options.device == "cpu":
            own |= {
                "VLLM_CPU_KVCACHE_SPACE": str(options.cpu_cache_gib),
                # unbound, all servers would sit on core 0
                "VLLM_CPU_OMP_THREADS_BIND": binding(options, number),
                "OMP_NUM_THREADS": str(options.threads),
                "LORELEI_RESTS": "1",  # launcher.RESTS
                "CUDA_VISIBLE_DEVICES": "",
            }
        return launch(self.name, LAUNCHER, arguments(options, port, host), token, own)

    def seed(self, request: GenerateRequest) -> int:
        # vLLM counts from the start of the answer
        return stream_seed(request.sampling.seed, request.key, request.position)

    async def workers(self, client: Client) -> int:
        found = await client.facts(
            "vLLM",
            f"start it with --worker-extension-cls {EXTENSION} --middleware {ROUTES} "
            f"--logprobs-mode {LOGPROBS_MODE} --enable-lora, and Lorelei on its PYTHONPATH",
        )
        with client.reading():
            exact = found["logprobs_mode"] == LOGPROBS_MODE and found["scores"]
            workers = int(found["workers"])
        if not exact:
            raise ValueError(
                f"rollout.urls: {client.url} cannot give the log-probabilities of what it samples; "
                f"start it with --logprobs-mode {LOGPROBS_MODE} --lora-target-modules "
                f"{' '.join(TARGETS)} and VLLM_USE_V2_MODEL_RUNNER=0"
            )
        return workers


def arguments(options: ServerOptions, port: int, host: str = LOOPBACK) -> tuple[str, ...]:
    """`serve MODEL ...`, as for the `vllm` command."""
    room = slots(options.versions, options.max_rank)
    derived: dict[str, Scalar] = {
        "host": host,
        "port": port,
        "served-model-name": "base",
        "dtype": options.dtype,
        "max-model-len": options.context + 1,  # the token that ends a score
        "max-num-seqs": options.max_running,
        "tensor-parallel-size": options.tensor_parallel,
        "enable-lora": True,
        "max-lora-rank": room.rank,
        "max-loras": room.versions,
        "max-cpu-loras": room.versions,
        "logprobs-mode": LOGPROBS_MODE,
        "worker-extension-cls": EXTENSION,
        "middleware": ROUTES,
        "disable-uvicorn-access-log": True,
        "disable-log-stats": True,  # they keep the names of all adapters that ever ran together
        "generation-config": "vllm",
        "skip-tokenizer-init": not options.has_tokenizer,
        "enable-sleep-mode": options.device != "cpu",
    }
    if options.device == "cpu":
        derived["block-size"] = 32
        derived["enforce-eager"] = True  # compiling takes longer than it saves
    words = flags({**derived, **options.extra_args})
    return ("serve", str(options.model), *words, "--lora-target-modules", *_targets(options))


def _targets(options: ServerOptions) -> tuple[str, ...]:
    """What may be adapted. On a CPU vLLM ends at its start where experts may be."""
    usual = ATTENTION if options.device == "cpu" and options.sizes.moe is not None else TARGETS
    return (*usual, *(name for name in options.target_modules if name not in TARGETS))
