"""How vLLM is spoken to: the routes of lorelei.inference.vllm.routes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorelei.inference.server.backend import Facts
from lorelei.inference.server.client import Client
from lorelei.inference.server.http_api import QUICK, Routed, reading
from lorelei.inference.server.options import ServerOptions
from lorelei.inference.server.process import LOOPBACK, Launch
from lorelei.inference.vllm import command
from lorelei.inference.vllm.command import EXTENSION, LOGPROBS_MODE, ROUTES, TARGETS


@dataclass(frozen=True, slots=True)
class VllmBackend(Routed):
    """Implements ServerBackend; options None: for servers that are attached to, not started."""

    options: ServerOptions | None

    @property
    def name(self) -> str:
        return "vllm"

    def launch(
        self, number: int, port: int, token: str, folder: Path, host: str = LOOPBACK
    ) -> Launch:
        assert self.options is not None, "attached servers are not started"
        return command.launch(self.options, number, port, token, host)

    async def facts(self, client: Client) -> Facts:
        try:
            found = await client.get("/lorelei/facts", QUICK)
        except KeyError as error:
            raise ValueError(
                f"rollout.urls: {client.url} is no vLLM server with Lorelei's routes; start it "
                f"with --worker-extension-cls {EXTENSION} --middleware {ROUTES} "
                f"--logprobs-mode {LOGPROBS_MODE} --enable-lora, and Lorelei on its PYTHONPATH"
            ) from error
        with reading(client):
            exact = found["logprobs_mode"] == LOGPROBS_MODE and found["scores"]
            facts = Facts(
                model=found["model"],
                dtype=found["dtype"],
                context=found["context"],
                max_rank=found["max_rank"],
                workers=found["workers"],
                device=found["device"],
                stops_strings=found["stops_strings"],
                receives=True,
            )
        if not exact:
            raise ValueError(
                f"rollout.urls: {client.url} cannot give the log-probabilities of what it samples; "
                f"start it with --logprobs-mode {LOGPROBS_MODE} --lora-target-modules "
                f"{' '.join(TARGETS)} and VLLM_USE_V2_MODEL_RUNNER=0"
            )
        return facts
