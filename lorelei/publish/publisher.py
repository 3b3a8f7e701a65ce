"""The publisher: each new version to one inference engine, all of them or none."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Protocol

from lorelei.inference.contract import InferenceEngine
from lorelei.inference.server.client import ServerTrouble
from lorelei.lora.state import AdapterState
from lorelei.publish.contract import PublishError
from lorelei.publish.page import wrong_digest
from lorelei.types import AdapterRef


class Transport(Protocol):
    """How the tensors of a version travel."""

    async def send(self, ref: AdapterRef, state: AdapterState) -> str | None:
        """Make it available everywhere. Returns and raises like ServerEngine.install."""
        ...

    async def unload(self, ref: AdapterRef) -> None:
        """Forget it and its files, once nothing in flight uses it."""
        ...

    @property
    def metrics(self) -> Mapping[str, float]:
        """Counts since the start that a step's record should have."""
        ...

    async def close(self) -> None:
        """Give up what was kept between versions: folders, groups."""
        ...


class Direct:
    """The engine's own `load`: a copy in this process, or bytes over HTTP to servers."""

    def __init__(self, engine: InferenceEngine) -> None:
        self._engine = engine

    async def send(self, ref: AdapterRef, state: AdapterState) -> str | None:
        return await self._engine.load(ref, state)

    async def unload(self, ref: AdapterRef) -> None:
        await self._engine.unload(ref)

    @property
    def metrics(self) -> Mapping[str, float]:
        return {}

    async def close(self) -> None:
        pass


class VersionPublisher:
    """Implements Publisher; without a transport, by the engine's own `load`."""

    def __init__(
        self, engine: InferenceEngine, run_id: str, transport: Transport | None = None
    ) -> None:
        self._engine, self._run_id = engine, run_id
        self._transport: Transport = transport or Direct(engine)

    async def publish(
        self, versions: Mapping[str, int], states: Mapping[str, AdapterState]
    ) -> dict[str, AdapterRef]:
        refs: dict[str, AdapterRef] = {}
        try:
            for name, version in versions.items():
                refs[name] = await self._publish_one(name, version, states[name])
        except BaseException:
            # all or none: a cancelled publication leaves nothing behind either
            for ref in refs.values():
                await self._transport.unload(ref)
            raise
        return refs

    async def _publish_one(self, name: str, version: int, state: AdapterState) -> AdapterRef:
        digest = await asyncio.to_thread(state.digest)
        ref = AdapterRef(name=name, version=version, run_id=self._run_id, digest=digest)
        try:
            installed = await self._transport.send(ref, state)
        except ValueError as error:
            raise PublishError(f"{ref}: the inference engine refuses it: {error}") from error
        except ServerTrouble as error:
            raise PublishError(f"{ref}: it does not arrive: {error}") from error
        if installed is not None and installed != digest:
            await self._transport.unload(ref)
            raise wrong_digest(ref, installed)
        return ref

    async def retire(self, ref: AdapterRef) -> None:
        await self._transport.unload(ref)

    @property
    def metrics(self) -> Mapping[str, float]:
        """See Publisher."""
        return self._transport.metrics

    async def close(self) -> None:
        """Give up what was kept between versions. Idempotent."""
        await self._transport.close()
