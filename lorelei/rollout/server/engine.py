"""RolloutEngine over servers of one kind.

A request is asked again, here or of another server, until one whole and right answer has come:
what a caller gets was sampled once, by the version that was asked for.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lorelei.lora.state import AdapterState
from lorelei.rollout.contract import EngineClosed, Health
from lorelei.rollout.limits import Limits
from lorelei.rollout.server.caretaker import Caretaker
from lorelei.rollout.server.client import Client, ServerTrouble
from lorelei.rollout.server.delivery import ByBytes, Delivery
from lorelei.rollout.server.dialect import Dialect, Sampled
from lorelei.rollout.server.place import HERE, Place
from lorelei.rollout.server.replicas import Replica, Router
from lorelei.rollout.stops import StopStrings, Tokenizer
from lorelei.types import AdapterRef, Completion, Floats, GenerateRequest, Ints

T = TypeVar("T")

ATTEMPTS = 5  # of one call, each after a failure of the server
PAUSE = 0.2  # seconds before the second attempt, doubled for each later one
_EMPTY = Completion(
    tokens=np.zeros(0, np.int32),
    logprobs=np.zeros(0, np.float32),
    versions=(),
    finish_reason="abort",
)


@dataclass(frozen=True, slots=True, eq=False)
class _Running:
    """A request that a server has."""

    adapter: AdapterRef | None


class ServerEngine:
    """Implements RolloutEngine. All calls come from one event loop.

    Servers that are started here are stopped by `close`; those attached to go on running, without
    the adapters that were loaded for us.
    """

    def __init__(
        self,
        dialect: Dialect,
        limits: Limits,
        folder: Path,
        *,
        tokenizer: Tokenizer | None = None,
        replicas: int = 1,
        urls: Sequence[str] = (),
        token: str | None = None,
        max_running: int = 64,
        place: Place = HERE,
    ) -> None:
        """Nothing is started before `start` or the first call.

        folder: for logs. urls: attach to these instead of starting `replicas`; `token` is theirs.
        max_running: requests in flight for each server. place: where servers are started.
        """
        self._dialect, self._limits, self._tokenizer = dialect, limits, tokenizer
        clients = [Client(url, token, dialect.silence) for url in urls]
        clients = clients or [Client("", None, dialect.silence) for _ in range(replicas)]
        self.replicas = tuple(
            Replica(number=n, dialect=dialect, client=client) for n, client in enumerate(clients)
        )
        self._router = Router(self.replicas, max_running)
        self._caretakers = [Caretaker(r, folder, self._restore, place) for r in self.replicas]
        self._live: dict[str, tuple[AdapterRef, Delivery]] = {}
        self._served: set[str] = set()
        self._users: Counter[str] = Counter()
        self._running: set[_Running] = set()
        self._aborts: Counter[str | None] = Counter()  # so far, by adapter; none: the base
        self._closed: BaseException | None = None
        self._tasks: set[asyncio.Task[Any]] = set()  # calls
        self._background: set[asyncio.Task[None]] = set()
        self._keeping: list[asyncio.Task[None]] = []
        self._changes: asyncio.Condition = asyncio.Condition()
        self._next_scorer = 0

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
        if name is not None:
            self._users[name] += 1
        try:
            return await self._until_closed(self._generate(request))
        finally:
            if name is not None:
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
        return await self._until_closed(self._score(sequences, adapter, temperature or 1.0))

    async def load(self, ref: AdapterRef, state: AdapterState) -> str | None:
        return await self.install(ref, ByBytes(ref=ref, state=state))

    async def install(self, ref: AdapterRef, delivery: Delivery) -> str | None:
        """Bring a version to every server, by that way, also to those that restart later.

        Returns like `load`: ref.digest when every server that can tell holds it, or a digest that
        differs; None when none can tell. Raises ServerTrouble when a server keeps failing, and
        ValueError when one refuses the adapter; then none has it.
        """
        self._check_open()
        name = ref.served_name
        self._live[name] = (ref, delivery)
        try:
            told = await self._until_closed(self._everywhere(lambda r: self._bring(r, name)))
        except BaseException:
            await self._forget(ref)
            raise
        self._served.add(name)
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
        await self._tell(self._dialect.pause)

    async def resume(self) -> None:
        await self._tell(self._dialect.resume)
        self._router.let_go("pause")

    async def abort(self, adapter: AdapterRef | None = None) -> None:
        self._check_open()
        name = self._name_of(adapter)
        if adapter is None:
            self._aborts.update([*self._users, None])
        else:
            self._aborts[name] += 1
        self._router.dismiss(name)
        await self._until_closed(self._abort_running(adapter))

    async def sleep(self) -> None:
        """What runs is started again after `wake`, with the same random numbers."""
        self._router.hold("sleep")
        await self._until_closed(self._abort_running())
        await self._tell(self._dialect.sleep)

    async def wake(self) -> None:
        await self._tell(self._dialect.wake)
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

    # --- one request

    async def _generate(self, request: GenerateRequest) -> Completion:
        await self._begun()
        name = self._name_of(request.adapter)
        aborts, trouble = self._aborts[name], None
        limit = self._limits.new_tokens(request)
        seed = stream_seed(request.sampling.seed, request.key, request.position)
        attempt = 0
        while attempt < ATTEMPTS:
            replica = await self._router.acquire((name, request.tokens.tobytes()))
            if replica is None or aborts != self._aborts[name]:
                if replica is not None:
                    self._router.release(replica)
                return _EMPTY
            running = _Running(request.adapter)
            self._running.add(running)
            try:
                sampled = await self._dialect.generate(replica.client, request, limit, seed)
                self._check_answer(sampled, request, limit)
            except (ServerTrouble, KeyError) as error:
                # KeyError: another server than the one we filled answers at this address
                trouble = error
                replica.suspect.set()
                if isinstance(error, KeyError) and name is not None:
                    replica.loaded.pop(name, None)
                    with suppress(ServerTrouble):
                        await self._load(replica, name)
            else:
                replica.finished += 1
                if sampled.finish_reason != "abort" or aborts != self._aborts[name]:
                    return self._completion(request, sampled)
                attempt -= 1  # put to sleep, or a server that is being stopped
            finally:
                self._running.discard(running)
                self._router.release(replica)
            attempt += 1
            await asyncio.sleep(PAUSE * 2 ** max(attempt - 1, 0))
        raise ServerTrouble(
            f"{request.adapter or 'the base model'}: {ATTEMPTS} attempts failed; the last one: "
            f"{trouble}"
        )

    def _check_answer(self, sampled: Sampled, request: GenerateRequest, limit: int) -> None:
        """Raises ServerTrouble for an answer that cannot be what was asked for."""
        name = self._name_of(request.adapter)
        wrong: str | None = None
        if sampled.served_name != name:
            wrong = f"{sampled.served_name} answered for {name}"
        elif len(sampled.logprobs) != len(sampled.tokens):
            wrong = f"{len(sampled.logprobs)} log-probabilities for {len(sampled.tokens)} tokens"
        elif not np.isfinite(sampled.logprobs).all():
            wrong = "log-probabilities are not finite"
        elif len(sampled.tokens) > limit or (
            sampled.finish_reason != "abort" and not len(sampled.tokens)
        ):
            wrong = f"{len(sampled.tokens)} tokens, 1 to {limit} were asked for"
        if wrong:
            raise ServerTrouble(f"{self._dialect.name}: a wrong answer: {wrong}")

    def _completion(self, request: GenerateRequest, sampled: Sampled) -> Completion:
        tokens, logprobs, reason = sampled.tokens, sampled.logprobs, sampled.finish_reason
        if request.sampling.stop_strings and self._tokenizer is not None:
            stops = StopStrings(self._tokenizer, request.sampling.stop_strings)
            for token in request.tokens[len(request.tokens) - request.position :].tolist():
                stops.completes(token)
            for count, token in enumerate(tokens.tolist(), start=1):
                if stops.completes(token):
                    tokens, logprobs, reason = tokens[:count], logprobs[:count], "stop"
                    break
        version = request.adapter.version if request.adapter is not None else 0
        return Completion(
            tokens=tokens,
            logprobs=logprobs,
            versions=((version, len(tokens)),) if len(tokens) else (),
            finish_reason=reason,
        )

    async def _score(
        self, sequences: Sequence[Ints], adapter: AdapterRef | None, temperature: float
    ) -> list[Floats]:
        await self._begun()
        longer = [sequence for sequence in sequences if len(sequence) > 1]
        trouble: Exception | None = None
        for attempt in range(ATTEMPTS):
            replica = await self._any_ready()
            try:
                scores = iter(
                    await self._dialect.score(replica.client, longer, adapter, temperature)
                )
                return [
                    next(scores) if len(sequence) > 1 else np.zeros(0, np.float32)
                    for sequence in sequences
                ]
            except (ServerTrouble, KeyError) as error:
                trouble = error
                replica.suspect.set()
            await asyncio.sleep(PAUSE * 2**attempt)
        raise ServerTrouble(f"score: {ATTEMPTS} attempts failed; the last one: {trouble}")

    async def _any_ready(self) -> Replica:
        async with self._changes:
            await self._changes.wait_for(lambda: any(r.ready for r in self.replicas))
        ready = [replica for replica in self.replicas if replica.ready]
        self._next_scorer += 1
        return ready[self._next_scorer % len(ready)]

    async def _abort_running(self, adapter: AdapterRef | None = None) -> None:
        """Until nothing runs that ran when the call came: a request may still be on its way."""
        meant = {t for t in self._running if adapter is None or t.adapter == adapter}
        for _ in range(100):
            await self._tell(lambda client: self._dialect.abort(client, adapter))
            if not meant & self._running:
                return
            await asyncio.sleep(0.02)

    # --- adapters

    async def _bring(self, replica: Replica, name: str) -> str | None:
        """Load one version on one server, waiting for the server. Returns what it holds."""
        trouble: ServerTrouble | None = None
        for attempt in range(ATTEMPTS):
            async with self._changes:
                await self._changes.wait_for(lambda: replica.ready)
            try:
                return await self._load(replica, name)
            except ServerTrouble as error:
                trouble = error
                replica.suspect.set()
            await asyncio.sleep(PAUSE * 2**attempt)
        assert trouble is not None
        raise trouble

    async def _load(self, replica: Replica, name: str) -> str | None:
        async with replica.loading:
            if name not in replica.loaded:
                incarnation = replica.incarnation
                digest = await self._live[name][1].to(replica)
                if incarnation != replica.incarnation:
                    raise ServerTrouble(f"{self._dialect.name}: it died after it loaded {name}")
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
                    await self._dialect.unload(replica.client, ref)

        # a server in trouble forgets by dying; nobody asks for the name again
        await asyncio.gather(*(unload(r) for r in self.replicas), return_exceptions=True)

    async def _drained(self, name: str) -> None:
        async with self._changes:
            await self._changes.wait_for(lambda: self._users[name] == 0)
        del self._users[name]

    # --- servers

    async def _begun(self) -> None:
        """Start the caretakers once."""
        if not self._keeping:
            for caretaker in self._caretakers:
                task = asyncio.create_task(caretaker.keep(self._changed))
                task.add_done_callback(self._broken)
                self._keeping.append(task)

    async def _all_ready(self) -> None:
        await self._begun()
        async with self._changes:
            await self._changes.wait_for(lambda: all(r.ready for r in self.replicas))

    def _changed(self) -> None:
        self._router.dispatch()
        self._spawn(self._notify())

    def _broken(self, task: asyncio.Task[None]) -> None:
        """A caretaker has given up: so does the engine."""
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
        await asyncio.gather(*(caretaker.stop() for caretaker in self._caretakers))
        await asyncio.gather(*(replica.client.close() for replica in self.replicas))

    async def _leave(self, replica: Replica) -> None:
        """Leave a server that was attached to as it was."""
        with suppress(ServerTrouble, KeyError, ValueError):
            await self._dialect.resume(replica.client)
            for name in list(replica.loaded):
                if name in self._live:
                    await self._dialect.unload(replica.client, self._live[name][0])

    async def _tell(self, call: Callable[[Client], Coroutine[Any, Any, None]]) -> None:
        """Tell it to every server that is up. One that is not has nothing to stop."""
        self._check_open()

        async def tell(replica: Replica) -> None:
            try:
                await call(replica.client)
            except ServerTrouble:
                replica.suspect.set()
                if replica.process is None or replica.process.alive:
                    raise

        await self._until_closed(self._begun())
        await self._everywhere(tell, only_ready=True)

    async def _everywhere(
        self, call: Callable[[Replica], Coroutine[Any, Any, T]], only_ready: bool = False
    ) -> list[T]:
        """The results, once all have ended; the first failure if there is one."""
        await self._begun()
        chosen = [r for r in self.replicas if r.ready or not only_ready]
        results = await asyncio.gather(*map(call, chosen), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results  # type: ignore[return-value]

    async def _look(self, replica: Replica) -> None:
        if replica.ready:
            with suppress(ServerTrouble):
                status = await self._dialect.status(replica.client)
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

    def _name_of(self, ref: AdapterRef | None) -> str | None:
        return ref.served_name if ref is not None else None

    def _name(self, ref: AdapterRef | None) -> str | None:
        """The served name. Raises KeyError for a version that is not loaded."""
        if ref is not None and ref.served_name not in self._served:
            served = ", ".join(sorted(self._served)) or "none"
            raise KeyError(f"adapter {ref} ({ref.served_name}) is not loaded; loaded: {served}")
        return self._name_of(ref)


def stream_seed(seed: int, key: str, position: int = 0) -> int:
    """A seed [0, 2**63) for the random stream named (seed, key), from a position on."""
    name = hashlib.blake2b(f"{seed}\0{key}\0{position}".encode(), digest_size=8).digest()
    return int.from_bytes(name, "little") >> 1
