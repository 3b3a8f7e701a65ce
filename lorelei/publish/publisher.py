"""The publisher: each new version to one inference engine, all of them or none."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from lorelei.inference.contract import InferenceEngine
from lorelei.inference.server.client import ServerTrouble
from lorelei.lora.state import AdapterState
from lorelei.publish.contract import PublishError, Transport
from lorelei.publish.page import wrong_digest
from lorelei.types import AdapterRef


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
    """Moves adapters, and nothing else, to an inference engine."""

    def __init__(
        self, engine: InferenceEngine, run_id: str, transport: Transport | None = None
    ) -> None:
        """Without a transport, by the engine's own `load`."""
        self._engine, self._run_id = engine, run_id
        self._transport: Transport = transport or Direct(engine)

    async def publish(
        self, versions: Mapping[str, int], states: Mapping[str, AdapterState]
    ) -> dict[str, AdapterRef]:
        """Send {adapter: version number} and return when every replica can serve them.

        states: what each of these versions is; nothing may change the tensors before the return.
        Raises PublishError; then none of the new versions may be used.
        """
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
        """Forget a version everywhere once nothing in flight uses it."""
        await self._transport.unload(ref)

    @property
    def metrics(self) -> Mapping[str, float]:
        """Counts since the start, for the records of steps."""
        return self._transport.metrics

    async def close(self) -> None:
        """Give up what was kept between versions: folders, groups. Idempotent."""
        await self._transport.close()
