"""How an SGLang server is started, and what it must be able to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorelei.inference.server.backend import Facts, stream_seed
from lorelei.inference.server.client import QUICK, READ_TIMEOUT, Client
from lorelei.inference.server.options import ServerOptions
from lorelei.inference.server.process import LOOPBACK, Launch
from lorelei.inference.sglang import command
from lorelei.inference.sglang.command import LAUNCHER
from lorelei.inference.sglang.kind import SPARE
from lorelei.types import GenerateRequest


@dataclass(frozen=True, slots=True)
class SglangBackend:
    """Implements ServerBackend; options None: for servers that are attached to, not started."""

    options: ServerOptions | None
    read_timeout: float = READ_TIMEOUT
    name: str = "sglang"

    def launch(
        self, number: int, port: int, token: str, folder: Path, host: str = LOOPBACK
    ) -> Launch:
        assert self.options is not None, "attached servers are not started"
        return command.launch(self.options, number, port, token, host)

    def seed(self, request: GenerateRequest) -> int:
        # our sampler counts positions from the start of the sequence, so that an interrupted
        # answer continues its stream
        return stream_seed(request.sampling.seed, request.key)

    async def facts(self, client: Client) -> Facts:
        how = f"start it with `python -P -m {LAUNCHER}`, Lorelei on its PYTHONPATH"
        try:
            found = await client.call("facts", read_timeout=QUICK)
        except KeyError as error:
            raise ValueError(
                f"rollout.urls: {client.url} is no SGLang server with Lorelei's routes; {how}"
            ) from error
        with client.reading():
            facts = Facts(**{**found, "context": found["context"] - SPARE})
        if found["max_rank"] is None:
            raise ValueError(
                f"rollout.urls: {client.url} takes no adapters; {how}, and with --enable-lora "
                "--max-lora-rank and --lora-target-modules"
            )
        return facts
