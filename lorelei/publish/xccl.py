"""Publishing by broadcast: NCCL or gloo from this process to every worker of every server.

Nothing is sent before every server has accepted to receive it. The group lives until a server
restarts or a broadcast fails, and is then made anew under another name.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import torch

from lorelei.inference.server import broadcast
from lorelei.inference.server.broadcast import Group
from lorelei.inference.server.client import ServerTrouble
from lorelei.inference.server.engine import ServerEngine, all_ended
from lorelei.inference.server.payload import BROADCAST, Payload, pack
from lorelei.inference.server.replicas import Replica
from lorelei.lora.state import AdapterState
from lorelei.train.remote.workers import open_store
from lorelei.types import AdapterRef


class Xccl:
    """Implements Transport. A version that no broadcast can carry goes as bytes: `fallbacks`."""

    def __init__(
        self,
        engine: ServerEngine,
        device: torch.device,
        host: str,
        timeout: float,
        warn: Callable[[str], None],
    ) -> None:
        """device: of the sender. host: where the servers find this process.

        warn: called on the first fallback.
        """
        self._engine, self._host, self._timeout, self._warn = engine, host, timeout, warn
        self._device = device if device.type == "cuda" else torch.device("cpu")
        self._store, self._port = open_store(host)
        self._group: Any = None
        self._name = ""
        self._members: tuple[tuple[int, int], ...] = ()
        self.broadcasts = 0
        self.fallbacks = 0  # versions that went as bytes

    async def send(self, ref: AdapterRef, state: AdapterState) -> str | None:
        await self._engine.start()
        data = await asyncio.to_thread(pack, state)
        try:
            await self._broadcast(ref, data)
            self.broadcasts += 1
        except (RuntimeError, KeyError, ValueError) as error:  # of a server, or of the group
            await self._leave()
            self.fallbacks += 1
            if self.fallbacks == 1:
                self._warn(
                    f"publish.kind: xccl: {ref} goes to the servers as bytes over HTTP, its "
                    f"broadcast failed: {error}; metrics.jsonl counts those that follow as "
                    "publish_fallbacks"
                )
        return await self._engine.install(ref, Payload(BROADCAST, data))

    async def unload(self, ref: AdapterRef) -> None:
        await self._engine.unload(ref)

    @property
    def metrics(self) -> Mapping[str, float]:
        return {"publish_fallbacks": self.fallbacks}

    async def close(self) -> None:
        await self._leave()

    async def _broadcast(self, ref: AdapterRef, data: bytes) -> None:
        servers = [replica for replica in self._engine.replicas if replica.ready]
        if self._group is None or self._members != tuple(r.identity for r in servers):
            await self._form(servers)
        asked = {"name": ref.served_name, "group": self._name, "size": len(data)}
        # once all have answered, so that no server accepts it after `leave`
        await all_ended(replica.client.call("receive", asked) for replica in servers)
        await asyncio.to_thread(broadcast.send, self._group, data, self._device)

    async def _form(self, servers: Sequence[Replica]) -> None:
        await self._leave()
        self._name = f"lorelei-{secrets.token_hex(8)}"
        backend = "nccl" if self._device.type == "cuda" else "gloo"
        workers = [replica.workers for replica in servers]
        firsts = [1 + sum(workers[:n]) for n in range(len(servers))]
        self._members = tuple(replica.identity for replica in servers)
        group = Group(
            name=self._name,
            host=self._host,
            port=self._port,
            size=1 + sum(workers),
            first_rank=0,
            backend=backend,
            timeout=self._timeout,
        )
        await all_ended(
            replica.client.call("join", asdict(replace(group, first_rank=first)))
            for replica, first in zip(servers, firsts, strict=True)
        )
        self._group = await asyncio.to_thread(broadcast.form, group, 0)

    async def _leave(self) -> None:
        """Servers that wait for a broadcast of the group stop waiting."""
        name, self._name, self._group, self._members = self._name, "", None, ()
        if not name:
            return
        for replica in self._engine.replicas:
            if replica.ready:
                with suppress(ServerTrouble, KeyError, ValueError):
                    await replica.client.call("leave", {"group": name})
