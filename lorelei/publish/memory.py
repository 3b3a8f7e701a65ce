"""Publishing inside one process: from a train engine's tensors to a rollout engine's copies."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from lorelei.publish.contract import PublishError
from lorelei.publish.page import wrong_digest
from lorelei.rollout.contract import RolloutEngine
from lorelei.train.contract import TrainEngine
from lorelei.types import AdapterRef


class MemoryPublisher:
    """Publisher to one rollout engine that takes adapter states as they are."""

    def __init__(self, engine: RolloutEngine, run_id: str) -> None:
        self._engine, self._run_id = engine, run_id

    async def publish(
        self, source: TrainEngine, versions: Mapping[str, int]
    ) -> dict[str, AdapterRef]:
        refs: dict[str, AdapterRef] = {}
        try:
            for name, version in versions.items():
                refs[name] = await self._publish_one(source, name, version)
        except BaseException:
            # all or none: a cancelled publication leaves nothing behind either
            for ref in refs.values():
                await self._engine.unload(ref)
            raise
        return refs

    async def _publish_one(self, source: TrainEngine, name: str, version: int) -> AdapterRef:
        state = await asyncio.to_thread(source.adapter_state, name)
        digest = await asyncio.to_thread(state.digest)
        ref = AdapterRef(name=name, version=version, run_id=self._run_id, digest=digest)
        try:
            installed = await self._engine.load(ref, state)
        except ValueError as error:
            raise PublishError(f"{ref}: the rollout engine refuses it: {error}") from error
        if installed is not None and installed != digest:
            await self._engine.unload(ref)
            raise wrong_digest(ref, installed)
        return ref

    async def retire(self, ref: AdapterRef) -> None:
        await self._engine.unload(ref)
