"""Keeps one replica up: starts it or attaches, checks its health, restarts it when it dies."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from lorelei.inference.contract import EngineClosed
from lorelei.inference.server.client import Client, ServerTrouble
from lorelei.inference.server.process import Launcher
from lorelei.inference.server.replicas import Replica

START = 600.0  # seconds for a server to come up: a large model is read, kernels are compiled
CHECK_EVERY = 3.0  # seconds between two health checks
CHECK_TIMEOUT = 10.0  # seconds for an answer to one
MAX_FAILED_CHECKS = 3  # in a row, after which a server counts as hung
MAX_STARTS = 3  # in a row without one answered request between them


class Supervisor:
    """Runs `keep` for as long as the engine is open."""

    def __init__(
        self,
        replica: Replica,
        folder: Path,
        restore: Callable[[Replica], Awaitable[None]],
        launcher: Launcher,
    ) -> None:
        """restore: makes a server that has just come up hold what it should.

        folder: for logs and other files of servers that are started.
        """
        self._replica, self._folder, self._restore = replica, folder, restore
        self._launcher = launcher
        self._starts_here = not replica.client.url  # else attached to
        self._useless_starts = 0

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
                self._useless_starts = 0
            replica.lost()
            changed()
            self._useless_starts += 1
            log_tail = replica.process.log_tail() if replica.process else ""
            await self.stop()
            if self._useless_starts >= MAX_STARTS or (
                self._starts_here and replica.incarnation == 1 and not replica.workers
            ):
                raise EngineClosed(self._failure_message(reason, log_tail))

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
                self._launcher, replica.backend, replica.number, token, self._folder
            )
            replica.client = Client(replica.process.url, token, replica.backend.read_timeout)
        replica.workers = await self._first_answer()
        await replica.client.warm_up()
        status = await replica.client.status()
        replica.base = replica.counter = status.tokens_generated
        await self._restore(replica)

    async def _first_answer(self) -> int:
        replica, deadline = self._replica, time.monotonic() + START
        while True:
            try:
                return await replica.backend.workers(replica.client)
            except ServerTrouble as trouble:
                if replica.process is not None and not replica.process.alive:
                    raise ServerTrouble("it ended while starting") from trouble
                if time.monotonic() > deadline:
                    raise ServerTrouble(f"no answer in {START:g} s: {trouble}") from trouble
            await asyncio.sleep(0.2)

    async def _watch(self, changed: Callable[[], None]) -> str:
        """Returns why the server is given up. A health check that succeeds ends doubts."""
        replica, failed = self._replica, 0
        while True:
            if not failed:
                with suppress(TimeoutError):
                    await asyncio.wait_for(replica.suspect.wait(), CHECK_EVERY)
            replica.suspect.clear()
            if replica.process is not None and not replica.process.alive:
                return "it ended"
            try:
                async with asyncio.timeout(CHECK_TIMEOUT):
                    status = await replica.client.status()
            except (ServerTrouble, TimeoutError) as trouble:
                failed += 1
                if failed >= MAX_FAILED_CHECKS:
                    return f"{MAX_FAILED_CHECKS} failed health checks: {trouble or 'no answer'}"
                await asyncio.sleep(0.5)
                continue
            failed = 0
            replica.counter = status.tokens_generated
            if set(replica.loaded) - set(status.adapters):
                return "it has lost adapters: another server answers at its address"
            if replica.doubted and not replica.suspect.is_set():
                replica.doubted = False
                changed()

    def _failure_message(self, reason: str, log_tail: str) -> str:
        replica = self._replica
        name = f"{replica.backend.name}-{replica.number}"
        tries = f" after {self._useless_starts} starts in a row" if self._useless_starts > 1 else ""
        log = self._folder / f"{name}.log"
        end = f"; its output is in {log}, which ends:\n{log_tail}" if log_tail else ""
        return f"server {name} ({replica.client.url}) was given up{tries}: {reason}{end}"
