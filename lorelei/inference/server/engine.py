"""InferenceEngine over servers of one kind: which versions they hold, and the engine's life."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from lorelei.inference.contract import EngineClosed, Health
from lorelei.inference.limits import Limits, check_loaded
from lorelei.inference.server.backend import ServerBackend
from lorelei.inference.server.client import Client, ServerTrouble, served_name
from lorelei.inference.server.payload import BYTES, Payload, pack
from lorelei.inference.server.process import Launcher, LocalServer
from lorelei.inference.server.replicas import Replica, Router
from lorelei.inference.server.requests import Attempts, Requests
from lorelei.inference.server.supervisor import Supervisor
from lorelei.lora.state import AdapterState
from lorelei.model.tokenizer import Tokenizer
from lorelei.types import AdapterRef, Completion, Floats, GenerateRequest, Ints

T = TypeVar("T")


class ServerEngine:
    """Implements InferenceEngine. All calls come from one event loop.

    Servers that are started here are stopped by `close`; those attached to keep running, without
    the adapters that were loaded by this engine.
    """

    def __init__(
        self,
        backend: ServerBackend,
        limits: Limits,
        folder: Path,
        *,
        tokenizer: Tokenizer | None = None,
        replicas: int = 1,
        urls: Sequence[str] = (),
        token: str | None = None,
        max_running: int = 64,
        launcher: Launcher = LocalServer,
    ) -> None:
        """Nothing is started before `start` or the first call.

        folder: for what the servers print. urls: attach to these instead of starting `replicas`;
        `token` is theirs. max_running: requests in flight for each server.
        """
        self._backend, self._limits = backend, limits
        clients = [Client(url, token, backend.read_timeout) for url in urls]
        clients = clients or [Client("", None, backend.read_timeout) for _ in range(replicas)]
        self.replicas = tuple(
            Replica(number=n, backend=backend, client=client) for n, client in enumerate(clients)
        )
        self._router = Router(self.replicas, max_running)
        self._requests = Requests(backend, limits, tokenizer, self._router, self._reload)
        self._supervisors = [Supervisor(r, folder, self._restore, launcher) for r in self.replicas]
        self._live: dict[str, tuple[AdapterRef, Payload]] = {}
        self._served: set[str] = set()
        self._users: Counter[str | None] = Counter()  # requests, by served name; None: the base
        self._closed: BaseException | None = None
        self._tasks: set[asyncio.Task[Any]] = set()  # calls
        self._background: set[asyncio.Task[None]] = set()
        self._keeping: list[asyncio.Task[None]] = []
        self._changes: asyncio.Condition = asyncio.Condition()

    async def start(self) -> None:
        """Start the servers, or find those attached to, and wait until all are ready.

        Raises EngineClosed with the end of the log of one that does not start, ValueError for one
        that lacks what is needed.
        """
        await self._until_closed(self._all_ready())

    # --- the contract

    async def generate(self, request: GenerateRequest) -> Completion:
        self._check_open()
        name = self._name(request.adapter)
        self._limits.check_request(request)
        self._users[name] += 1
        try:
            self._begin()
            return await self._until_closed(self._requests.generate(request))
        finally:
            self._users[name] -= 1
            await self._notify()

    async def score(
        self, sequences: Sequence[Ints], adapter: AdapterRef | None, temperature: float = 1.0
    ) -> list[Floats]:
        """One server computes it; the next call goes to the next one."""
        self._check_open()
        self._name(adapter)
        for sequence in sequences:
            self._limits.check_sequence(sequence)
        self._begin()
        scores = self._requests.score(sequences, adapter, temperature or 1.0)
        return await self._until_closed(scores)

    async def load(self, ref: AdapterRef, state: AdapterState) -> str | None:
        return await self.install(ref, Payload(BYTES, await asyncio.to_thread(pack, state)))

    async def install(self, ref: AdapterRef, payload: Payload) -> str | None:
        """Bring a version to every server, also to those that restart later.

        Returns like `load`: ref.digest when every server that can tell holds it, or a digest that
        differs; None when none can tell. Raises ServerTrouble when a server keeps failing, and
        ValueError when one refuses the adapter; then none has it.
        """
        self._check_open()
        name = ref.served_name
        self._live[name] = (ref, payload)
        bring = partial(self._bring, name)
        try:
            told = await self._everywhere(bring, self.replicas)
        except BaseException:
            await self._forget(ref)
            raise
        self._served.add(name)
        # servers that came up again meanwhile, without a version that nobody was served yet
        lacking = [r for r in self.replicas if r.ready and name not in r.loaded]
        told += await self._everywhere(bring, lacking)
        digests = {digest for digest in told if digest is not None}
        return next(iter(digests - {ref.digest}), ref.digest if digests else None)

    async def unload(self, ref: AdapterRef) -> None:
        self._check_open()
        name = self._name(ref)
        assert name is not None
        self._served.remove(name)  # from now on no request may use it
        await self._until_closed(self._drained(name))
        await self._forget(ref)

    async def pause(self) -> None:
        self._router.hold("pause")
        await self._tell("pause")

    async def resume(self) -> None:
        await self._tell("resume")
        self._router.let_go("pause")

    async def abort(self, adapter: AdapterRef | None = None) -> None:
        self._check_open()
        self._requests.dismiss(adapter, self._users)
        await self._until_closed(self._end(adapter))

    async def sleep(self) -> None:
        """What runs is started again after `wake`, with the same random numbers."""
        self._router.hold("sleep")
        self._requests.put_off()
        await self._until_closed(self._end(None))
        await self._tell("sleep")

    async def wake(self) -> None:
        await self._tell("wake")
        self._router.let_go("sleep")

    async def health(self) -> Health:
        if self._closed is None:
            await asyncio.gather(*(self._look(replica) for replica in self.replicas))
        return Health(
            alive=self._closed is None,
            running=sum(replica.in_flight for replica in self.replicas),
            waiting=self._router.waiting,
            adapters=tuple(sorted(self._served)),
            tokens_generated=sum(replica.tokens for replica in self.replicas),
        )

    async def close(self) -> None:
        await self._close(EngineClosed("the engine was closed"))

    # --- adapters

    async def _bring(self, name: str, replica: Replica) -> str | None:
        """Load one version on one server, waiting for the server. Returns what it holds."""
        attempts = Attempts(f"loading {name}")
        while True:
            async with self._changes:
                await self._changes.wait_for(lambda: replica.usable)
            try:
                return await self._load(replica, name)
            except (ServerTrouble, KeyError) as error:
                await attempts.failed(replica, error)

    async def _reload(self, replica: Replica, ref: AdapterRef) -> None:
        """A server says that it does not know a version which it should have."""
        replica.loaded.pop(ref.served_name, None)
        if ref.served_name in self._live:
            with suppress(ServerTrouble, KeyError):  # the request meets it again
                await self._load(replica, ref.served_name)

    async def _load(self, replica: Replica, name: str) -> str | None:
        async with replica.loading:
            if name not in replica.loaded:
                incarnation = replica.incarnation
                digest = await replica.client.load(*self._live[name])
                if incarnation != replica.incarnation:
                    raise ServerTrouble(f"{self._backend.name}: it died after it loaded {name}")
                replica.loaded[name] = digest
            return replica.loaded[name]

    async def _restore(self, replica: Replica) -> None:
        """Every served version, on a server that has just come up."""
        while missing := self._served - replica.loaded.keys():
            for name in missing & self._live.keys():
                ref, _ = self._live[name]
                digest = await self._load(replica, name)
                if digest not in (None, ref.digest):
                    raise ServerTrouble(f"{ref}: it holds {digest} after a restart")

    async def _forget(self, ref: AdapterRef) -> None:
        self._live.pop(ref.served_name, None)

        async def unload(replica: Replica) -> None:
            async with replica.loading:
                replica.loaded.pop(ref.served_name, None)
                if replica.ready:
                    await replica.client.unload(ref)

        # a server in trouble forgets by dying; nobody asks for the name again
        await asyncio.gather(*(unload(r) for r in self.replicas), return_exceptions=True)

    async def _drained(self, name: str) -> None:
        async with self._changes:
            await self._changes.wait_for(lambda: self._users[name] == 0)
        del self._users[name]

    # --- servers

    async def _end(self, adapter: AdapterRef | None) -> None:
        """End what runs: everything, or one version's."""
        asked = {"adapter": served_name(adapter)}
        await self._requests.end(adapter, lambda: self._tell("abort", asked))

    def _begin(self) -> None:
        """Start the supervisors once."""
        if not self._keeping:
            for supervisor in self._supervisors:
                task = asyncio.create_task(supervisor.keep(self._changed))
                task.add_done_callback(self._broken)
                self._keeping.append(task)

    async def _all_ready(self) -> None:
        self._begin()
        async with self._changes:
            await self._changes.wait_for(lambda: all(r.ready for r in self.replicas))

    def _changed(self) -> None:
        self._router.dispatch()
        self._spawn(self._notify())

    def _broken(self, task: asyncio.Task[None]) -> None:
        """A supervisor has given up: so does the engine."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._spawn(self._close(error))

    async def _close(self, reason: BaseException) -> None:
        first = self._closed is None
        self._closed = self._closed or reason
        for task in list(self._tasks):
            task.cancel()
        for task in self._keeping:
            task.cancel()
        await asyncio.gather(*self._keeping, return_exceptions=True)
        if first:
            for replica in self.replicas:
                if replica.process is None and replica.ready:
                    await self._leave(replica)
        await asyncio.gather(*(supervisor.stop() for supervisor in self._supervisors))
        await asyncio.gather(*(replica.client.close() for replica in self.replicas))

    async def _leave(self, replica: Replica) -> None:
        """Leave a server that was attached to as it was."""
        with suppress(ServerTrouble, KeyError, ValueError):
            await replica.client.call("resume")
            for name in list(replica.loaded):
                if name in self._live:
                    await replica.client.unload(self._live[name][0])

    async def _tell(self, route: str, asked: Mapping[str, Any] | None = None) -> None:
        """Tell it to every server that is up. One that is not has nothing to stop."""
        self._check_open()

        async def tell(replica: Replica) -> None:
            try:
                await replica.client.call(route, asked)
            except ServerTrouble:
                replica.doubt()
                if replica.process is None or replica.process.alive:
                    raise

        await self._everywhere(tell, [replica for replica in self.replicas if replica.ready])

    async def _everywhere(
        self, call: Callable[[Replica], Awaitable[T]], chosen: Sequence[Replica]
    ) -> list[T]:
        """The results, once all have ended; the first failure if there is one."""
        self._begin()

        return await self._until_closed(all_ended(map(call, chosen)))

    async def _look(self, replica: Replica) -> None:
        if replica.ready:
            with suppress(ServerTrouble):
                status = await replica.client.status()
                replica.counter = max(replica.counter, status.tokens_generated)

    # --- the end of the engine

    async def _until_closed(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`. Raises EngineClosed, or why the engine broke, when it is over."""
        if self._closed is not None:
            work.close()
            self._check_open()
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait({task})
            raise
        if task.cancelled():
            self._check_open()
        return task.result()

    def _check_open(self) -> None:
        if self._closed is not None:
            if isinstance(self._closed, ValueError):
                raise ValueError(str(self._closed)) from self._closed
            raise EngineClosed(str(self._closed)) from self._closed

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _notify(self) -> None:
        async with self._changes:
            self._changes.notify_all()

    def _name(self, ref: AdapterRef | None) -> str | None:
        """The served name. Raises KeyError for a version that is not loaded."""
        check_loaded(ref, self._served)
        return served_name(ref)


async def all_ended(calls: Iterable[Awaitable[T]]) -> list[T]:
    """The results, once all have ended; raises the first failure."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results  # type: ignore[return-value]  # no exception is left
