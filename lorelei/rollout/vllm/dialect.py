"""How vLLM is spoken to: the routes of lorelei.rollout.vllm.routes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorelei.rollout.server.client import Client
from lorelei.rollout.server.dialect import Facts
from lorelei.rollout.server.options import ServerOptions
from lorelei.rollout.server.process import LOOPBACK, Launch
from lorelei.rollout.server.routed import QUICK, Routed, reading
from lorelei.rollout.vllm import command
from lorelei.rollout.vllm.command import EXTENSION, LOGPROBS_MODE, ROUTES, TARGETS


@dataclass(frozen=True, slots=True)
class VllmDialect(Routed):
    """Implements Dialect for servers that are started with `options`, or attached to (none)."""

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
