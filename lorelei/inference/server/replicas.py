"""The servers of an engine, and which of them gets the next request."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from lorelei.inference.server.backend import ServerBackend
from lorelei.inference.server.client import Client
from lorelei.inference.server.process import RunningServer

HOMES = 4096  # prompts whose replica is remembered
SLACK = 4  # requests that a prompt's replica may be ahead of the least busy one

Key = tuple[str | None, bytes]


@dataclass(slots=True, eq=False)
class Replica:
    """One server, through all its restarts."""

    number: int
    backend: ServerBackend
    client: Client
    process: RunningServer | None = None  # None: attached to, or not started yet
    workers: int = 0  # that hold the model; 0: not known yet
    incarnation: int = 0  # starts so far
    ready: bool = False
    doubted: bool = False  # a call failed, and the supervisor has not checked since
    in_flight: int = 0
    finished: int = 0  # requests answered since the last start
    loaded: dict[str, str | None] = field(default_factory=dict[str, "str | None"])  # name: digest
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)
    suspect: asyncio.Event = field(default_factory=asyncio.Event)  # wakes the supervisor
    counted: int = 0  # tokens of earlier starts
    counter: int = 0  # the server's own, as last read
    base: int = 0  # the server's own when we came

    @property
    def tokens(self) -> int:
        """Tokens generated for us, as far as known."""
        return self.counted + self.counter - self.base

    @property
    def usable(self) -> bool:
        """Whether a request may go there now."""
        return self.ready and not self.doubted

    def doubt(self) -> None:
        """A call failed: nothing is sent there before the supervisor has checked the server."""
        self.doubted = True
        self.suspect.set()

    def lost(self) -> None:
        """The server is gone, and what it held with it."""
        self.ready = self.doubted = False
        self.loaded.clear()
        self.counted, self.counter, self.base = self.tokens, 0, 0
        self.finished = 0

    @property
    def identity(self) -> tuple[int, int]:
        """Changes when the server restarts."""
        return self.number, self.incarnation


class Router:
    """First come, first served; the least busy server that is ready, or the prompt's own.

    Requests of one prompt under one adapter share its cached prefix on one server, unless that
    server is clearly busier than another. Requests wait here and not in a server's queue, so
    that what waits goes to whichever server is free first.
    """

    def __init__(self, replicas: Sequence[Replica], max_running: int) -> None:
        """max_running: requests in flight for each server."""
        self._replicas, self._max_running = replicas, max_running
        self._homes: OrderedDict[Key, Replica] = OrderedDict()
        self._waiting: deque[tuple[asyncio.Future[Replica | None], Key]] = deque()
        self._held: set[str] = set()
        self._any_usable = asyncio.Event()  # since `any_ready` last looked
        self._turn = 0

    @property
    def waiting(self) -> int:
        """Requests that no server has yet."""
        return len(self._waiting)

    async def acquire(self, key: Key) -> Replica | None:
        """A server with room, counted as in flight until `release`; None: see `dismiss`."""
        future: asyncio.Future[Replica | None] = asyncio.get_running_loop().create_future()
        self._waiting.append((future, key))
        self.dispatch()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and (replica := future.result()):
                self.release(replica)  # it was given one in the very moment
            raise

    async def any_ready(self) -> Replica:
        """A server for a call that is short and not counted: the next one each time."""
        while not (usable := [replica for replica in self._replicas if replica.usable]):
            self._any_usable.clear()
            await self._any_usable.wait()
        self._turn += 1
        return usable[self._turn % len(usable)]

    def release(self, replica: Replica) -> None:
        """A request is over, for good or to be asked again."""
        replica.in_flight -= 1
        self.dispatch()

    def hold(self, why: str) -> None:
        """Send nothing until `let_go` with the same reason."""
        self._held.add(why)

    def let_go(self, why: str) -> None:
        self._held.discard(why)
        self.dispatch()

    def dismiss(self, adapter: str | None = None) -> None:
        """Answer None to all waiting requests, or to those of one adapter."""
        waiting, self._waiting = self._waiting, deque()
        for future, key in waiting:
            if adapter not in (None, key[0]):
                self._waiting.append((future, key))
            elif not future.done():
                future.set_result(None)

    def dispatch(self) -> None:
        """Give out servers; to be called when one has become usable."""
        if any(replica.usable for replica in self._replicas):
            self._any_usable.set()
        while self._waiting and not self._held:
            future, key = self._waiting[0]
            if future.done():  # cancelled
                self._waiting.popleft()
                continue
            replica = self._choose(key)
            if replica is None:
                return
            self._waiting.popleft()
            replica.in_flight += 1
            future.set_result(replica)

    def _choose(self, key: Key) -> Replica | None:
        free = [r for r in self._replicas if r.usable and r.in_flight < self._max_running]
        if not free:
            return None
        least = min(free, key=lambda r: (r.in_flight, r.number))
        home = self._homes.get(key)
        if home is None or home not in free or home.in_flight > least.in_flight + SLACK:
            home = least
        self._homes[key] = home
        self._homes.move_to_end(key)
        if len(self._homes) > HOMES:
            self._homes.popitem(last=False)
        return home
