"""Publishing by disk: an immutable PEFT folder for each version, which the servers read."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping
from pathlib import Path

from lorelei.inference.server.engine import ServerEngine
from lorelei.inference.server.payload import FOLDER, Payload
from lorelei.lora.peft_folder import write_peft_folder
from lorelei.lora.state import AdapterState
from lorelei.types import AdapterRef


class Disk:
    """Implements Transport. A folder is durable before any server hears of it."""

    def __init__(self, engine: ServerEngine, folder: Path, base_model: str) -> None:
        """folder: used by nothing else; what an earlier process left there is deleted."""
        self._engine, self._folder, self._base_model = engine, folder.absolute(), base_model
        shutil.rmtree(self._folder, ignore_errors=True)

    async def send(self, ref: AdapterRef, state: AdapterState) -> str | None:
        folder = self._folder / ref.served_name
        await asyncio.to_thread(write_peft_folder, folder, state, self._base_model)
        try:
            return await self._engine.install(ref, Payload(FOLDER, str(folder).encode()))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    async def unload(self, ref: AdapterRef) -> None:
        await self._engine.unload(ref)
        await asyncio.to_thread(shutil.rmtree, self._folder / ref.served_name, True)

    @property
    def metrics(self) -> Mapping[str, float]:
        return {}

    async def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
