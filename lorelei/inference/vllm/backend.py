"""How a vLLM server is started, and what it must be able to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorelei.inference.server.backend import Facts, stream_seed
from lorelei.inference.server.client import QUICK, READ_TIMEOUT, Client
from lorelei.inference.server.options import ServerOptions
from lorelei.inference.server.process import LOOPBACK, Launch
from lorelei.inference.vllm import command
from lorelei.inference.vllm.command import EXTENSION, LOGPROBS_MODE, ROUTES, TARGETS
from lorelei.types import GenerateRequest


@dataclass(frozen=True, slots=True)
class VllmBackend:
    """Implements ServerBackend; options None: for servers that are attached to, not started."""

    options: ServerOptions | None
    read_timeout: float = READ_TIMEOUT
    name: str = "vllm"

    def launch(
        self, number: int, port: int, token: str, folder: Path, host: str = LOOPBACK
    ) -> Launch:
        assert self.options is not None, "attached servers are not started"
        return command.launch(self.options, number, port, token, host)

    def seed(self, request: GenerateRequest) -> int:
        # vLLM counts from the start of the answer
        return stream_seed(request.sampling.seed, request.key, request.position)

    async def facts(self, client: Client) -> Facts:
        try:
            found = await client.call("facts", read_timeout=QUICK)
        except KeyError as error:
            raise ValueError(
                f"rollout.urls: {client.url} is no vLLM server with Lorelei's routes; start it "
                f"with --worker-extension-cls {EXTENSION} --middleware {ROUTES} "
                f"--logprobs-mode {LOGPROBS_MODE} --enable-lora, and Lorelei on its PYTHONPATH"
            ) from error
        with client.reading():
            exact = found.pop("logprobs_mode") == LOGPROBS_MODE and found.pop("scores")
            facts = Facts(**found)
        if not exact:
            raise ValueError(
                f"rollout.urls: {client.url} cannot give the log-probabilities of what it samples; "
                f"start it with --logprobs-mode {LOGPROBS_MODE} --lora-target-modules "
                f"{' '.join(TARGETS)} and VLLM_USE_V2_MODEL_RUNNER=0"
            )
        return facts
