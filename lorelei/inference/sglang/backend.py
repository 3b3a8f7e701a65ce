"""How SGLang is started and asked what it can do; the rest is Lorelei's routes inside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorelei.inference.server.backend import Facts, Sampled
from lorelei.inference.server.client import Client
from lorelei.inference.server.http_api import QUICK, Routed, reading
from lorelei.inference.server.options import ServerOptions
from lorelei.inference.server.process import LOOPBACK, Launch
from lorelei.inference.server.seed import stream_seed
from lorelei.inference.sglang import command
from lorelei.inference.sglang.command import LAUNCHER, SPARE
from lorelei.types import GenerateRequest


@dataclass(frozen=True, slots=True)
class SglangBackend(Routed):
    """Implements ServerBackend; options None: for servers that are attached to, not started."""

    options: ServerOptions | None

    @property
    def name(self) -> str:
        return "sglang"

    def launch(
        self, number: int, port: int, token: str, folder: Path, host: str = LOOPBACK
    ) -> Launch:
        assert self.options is not None, "attached servers are not started"
        return command.launch(self.options, number, port, token, host)

    async def generate(
        self, client: Client, request: GenerateRequest, limit: int, seed: int
    ) -> Sampled:
        # our sampler counts positions from the start of the sequence, so that the stream of an
        # answer that was interrupted goes on where it was
        stream = stream_seed(request.sampling.seed, request.key)
        return await Routed.generate(self, client, request, limit, stream)

    async def facts(self, client: Client) -> Facts:
        how = f"start it with `python -P -m {LAUNCHER}`, Lorelei on its PYTHONPATH"
        try:
            found = await client.get("/lorelei/facts", QUICK)
        except KeyError as error:
            raise ValueError(
                f"rollout.urls: {client.url} is no SGLang server with Lorelei's routes; {how}"
            ) from error
        with reading(client):
            takes_adapters = found["max_rank"] is not None
            facts = Facts(**{**found, "context": found["context"] - SPARE}, receives=True)
        if not takes_adapters:
            raise ValueError(
                f"rollout.urls: {client.url} takes no adapters; {how}, and with --enable-lora "
                "--max-lora-rank and --lora-target-modules"
            )
        return facts
