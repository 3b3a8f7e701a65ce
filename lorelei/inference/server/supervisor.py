"""Keeps one replica up: starts it or finds it, watches it, and starts it again when it dies."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from lorelei.inference.contract import EngineClosed
from lorelei.inference.server.backend import Facts
from lorelei.inference.server.client import Client, ServerTrouble
from lorelei.inference.server.launcher import Launcher
from lorelei.inference.server.replicas import Replica

START = 600.0  # seconds for a server to come up: a large model is read, kernels are compiled
WATCH = 3.0  # seconds between two looks
STATUS = 10.0  # seconds for an answer to one look
LOOKS = 3  # looks in vain, one after another, after which a server counts as hung
STARTS = 3  # in a row without one answered request between them


class Supervisor:
    """Runs `keep` for as long as the engine is open."""

    def __init__(
        self,
        replica: Replica,
        folder: Path,
        restore: Callable[[Replica], Awaitable[None]],
        place: Launcher,
    ) -> None:
        """restore: makes a server that has just come up hold what it should.

        folder: for logs and other files of servers that are started. place: where that is.
        """
        self._replica, self._folder, self._restore = replica, folder, restore
        self._place = place
        self._starts_here = not replica.client.url  # else attached to
        self._fruitless = 0

    async def keep(self, changed: Callable[[], None]) -> None:
        """Calls `changed` when the replica became usable or was lost; ends by raising only.

        Raises ValueError for a server that cannot do what is needed, EngineClosed when it dies
        again and again, or cannot be started at all.
        """
        replica = self._replica
        while True:
            replica.suspect.clear()
            try:
                await self._bring_up()
                replica.ready, replica.doubted = True, False
                changed()
                reason = await self._watch(changed)
            except ServerTrouble as trouble:
                reason = str(trouble)
            if replica.finished:
                self._fruitless = 0
            replica.lost()
            changed()
            self._fruitless += 1
            words = replica.process.log_tail() if replica.process else ""
            await self.stop()
            if self._fruitless >= STARTS or (
                self._starts_here and replica.incarnation == 1 and not replica.facts
            ):
                raise EngineClosed(self._failure_message(reason, words))

    async def stop(self) -> None:
        """End the server, if it was started here."""
        if self._replica.process is not None:
            await self._replica.process.stop()
            self._replica.process = None

    async def _bring_up(self) -> None:
        replica = self._replica
        replica.incarnation += 1
        if self._starts_here:
            token = secrets.token_hex(16)
            await replica.client.close()
            replica.process = await asyncio.to_thread(
                self._place.start, replica.backend, replica.number, token, self._folder
            )
            replica.client = Client(replica.process.url, token, replica.backend.read_timeout)
        replica.facts = await self._first_answer()
        await replica.backend.warm_up(replica.client)
        status = await replica.backend.status(replica.client)
        replica.base = replica.counter = status.tokens_generated
        await self._restore(replica)

    async def _first_answer(self) -> Facts:
        replica, deadline = self._replica, time.monotonic() + START
        while True:
            try:
                return await replica.backend.facts(replica.client)
            except ServerTrouble as trouble:
                if replica.process is not None and not replica.process.alive:
                    raise ServerTrouble("it ended while starting") from trouble
                if time.monotonic() > deadline:
                    raise ServerTrouble(f"no answer in {START:g} s: {trouble}") from trouble
            await asyncio.sleep(0.2)

    async def _watch(self, changed: Callable[[], None]) -> str:
        """Returns why the server is given up. Ends doubts that a look answers."""
        replica, vain = self._replica, 0
        while True:
            if not vain:
                with suppress(TimeoutError):
                    await asyncio.wait_for(replica.suspect.wait(), WATCH)
            replica.suspect.clear()
            if replica.process is not None and not replica.process.alive:
                return "it ended"
            try:
                async with asyncio.timeout(STATUS):
                    status = await replica.backend.status(replica.client)
            except (ServerTrouble, TimeoutError) as trouble:
                vain += 1
                if vain >= LOOKS:
                    return f"{LOOKS} looks in vain: {trouble or 'no answer'}"
                await asyncio.sleep(0.5)
                continue
            vain = 0
            replica.counter = status.tokens_generated
            if set(replica.loaded) - set(status.adapters):
                return "it has lost adapters: another server answers at its address"
            if replica.doubted and not replica.suspect.is_set():
                replica.doubted = False
                changed()

    def _failure_message(self, reason: str, words: str) -> str:
        replica = self._replica
        name = f"{replica.backend.name}-{replica.number}"
        tries = f" after {self._fruitless} starts in a row" if self._fruitless > 1 else ""
        log = self._folder / f"{name}.log"
        end = f"; its output is in {log}, which ends:\n{words}" if words else ""
        return f"server {name} ({replica.client.url}) was given up{tries}: {reason}{end}"
