"""Requests to servers, repeated until one complete and valid answer has come.

A caller gets an answer that was sampled once, by the version that was asked for: an attempt that
failed gives nothing, however far it came.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence

import numpy as np

from lorelei.inference.contract import completion
from lorelei.inference.limits import Limits
from lorelei.inference.server.backend import ServerBackend
from lorelei.inference.server.client import ServerTrouble, served_name
from lorelei.inference.server.replicas import Replica, Router
from lorelei.inference.stops import StopStrings
from lorelei.model.tokenizer import Tokenizer
from lorelei.types import AdapterRef, Completion, Floats, GenerateRequest, Ints

ATTEMPTS = 5  # of one call, each after a failure of a server
PAUSE = 0.2  # seconds before the second attempt, doubled for each later one
_EMPTY = completion(None, [], [], "abort")


class Attempts:
    """The failures of one call so far."""

    def __init__(self, what: str) -> None:
        """what: the call, for people."""
        self._what = what
        self._failed = 0

    async def failed(self, replica: Replica, error: Exception) -> None:
        """Return when it is time for another attempt. Raises ServerTrouble after the last one."""
        replica.doubt()
        self._failed += 1
        if self._failed >= ATTEMPTS:
            raise ServerTrouble(
                f"{self._what}: {ATTEMPTS} attempts failed; the last one: {error}"
            ) from error
        await asyncio.sleep(PAUSE * 2 ** (self._failed - 1))


class Requests:
    """Generation and scoring on whichever server is free."""

    def __init__(
        self,
        backend: ServerBackend,
        limits: Limits,
        tokenizer: Tokenizer | None,
        router: Router,
        reload: Callable[[Replica, AdapterRef], Awaitable[None]],
    ) -> None:
        """reload: brings a version again to a server that does not know it."""
        self._backend, self._limits, self._tokenizer = backend, limits, tokenizer
        self._router, self._reload = router, reload
        self._running: dict[object, AdapterRef | None] = {}  # of each request that a server has
        self._aborts: Counter[str | None] = Counter()  # so far, by adapter; None: the base
        self._put_off = 0  # times that all were ended to be asked again

    async def generate(self, request: GenerateRequest) -> Completion:
        """Raises ServerTrouble when all attempts have failed."""
        name = served_name(request.adapter)
        aborts = self._aborts[name]
        limit = self._limits.new_tokens(request)
        seed = self._backend.seed(request)
        attempts = Attempts(str(request.adapter or "the base model"))
        while True:
            replica = await self._router.acquire((name, request.tokens.tobytes()))
            if replica is None or aborts != self._aborts[name]:
                if replica is not None:
                    self._router.release(replica)
                return _EMPTY
            running, put_off = object(), self._put_off
            self._running[running] = request.adapter
            try:
                sampled = await replica.client.generate(request, limit, seed)
                self._check(sampled, limit)
                aborted = sampled.finish_reason == "abort" and aborts == self._aborts[name]
                if aborted and put_off == self._put_off:
                    raise ServerTrouble(f"{replica.client.url} ended the request by itself")
            except (ServerTrouble, KeyError) as error:
                trouble = error
            else:
                replica.finished += 1
                if not aborted:
                    return self._up_to_stop(request, sampled)
                continue
            finally:
                del self._running[running]
                self._router.release(replica)
            await self._again(replica, request.adapter, trouble, attempts)

    async def score(
        self, sequences: Sequence[Ints], adapter: AdapterRef | None, temperature: float
    ) -> list[Floats]:
        """As InferenceEngine.score. Raises ServerTrouble when all attempts have failed."""
        longer = [sequence for sequence in sequences if len(sequence) > 1]
        attempts = Attempts(f"score of {adapter or 'the base model'}")
        while True:
            replica = await self._router.any_ready()
            try:
                scored = await replica.client.score(longer, adapter, temperature)
                if not all(np.isfinite(one).all() for one in scored):
                    raise ServerTrouble(f"{replica.client.url}: scores are not finite")
            except (ServerTrouble, KeyError) as error:
                await self._again(replica, adapter, error, attempts)
                continue
            scores = iter(scored)
            return [
                next(scores) if len(sequence) > 1 else np.zeros(0, np.float32)
                for sequence in sequences
            ]

    def dismiss(self, adapter: AdapterRef | None, names: Iterable[str | None]) -> None:
        """Waiting requests are answered empty; running ones are not asked again when they end.

        adapter: only that version's requests; None: those of all `names`, None for the base.
        """
        name = served_name(adapter)
        self._aborts.update([*names] if name is None else [name])
        self._router.dismiss(name)

    async def end(self, adapter: AdapterRef | None, tell: Callable[[], Awaitable[None]]) -> None:
        """Repeat `tell` until nothing runs that ran at the call: a request may not be there yet."""
        meant = {r for r, of in self._running.items() if adapter is None or of == adapter}
        for _ in range(100):
            await tell()
            if meant.isdisjoint(self._running):
                return
            await asyncio.sleep(0.02)

    def put_off(self) -> None:
        """Requests that are ended from now on are asked again, with the same random numbers."""
        self._put_off += 1

    async def _again(
        self,
        replica: Replica,
        adapter: AdapterRef | None,
        trouble: Exception,
        attempts: Attempts,
    ) -> None:
        await attempts.failed(replica, trouble)
        # KeyError: another server than the one we filled answers at this address
        if isinstance(trouble, KeyError) and adapter is not None:
            await self._reload(replica, adapter)

    def _check(self, sampled: Completion, limit: int) -> None:
        """Raises ServerTrouble for an answer that cannot be what was asked for."""
        count = len(sampled.tokens)
        wrong: str | None = None
        if len(sampled.logprobs) != count:
            wrong = f"{len(sampled.logprobs)} log-probabilities for {count} tokens"
        elif not np.isfinite(sampled.logprobs).all():
            wrong = "log-probabilities are not finite"
        elif count > limit or (sampled.finish_reason != "abort" and not count):
            wrong = f"{count} tokens, 1 to {limit} were asked for"
        elif sampled.finish_reason == "length" and count < limit:
            wrong = f"{count} tokens where nothing but the limit of {limit} ends the answer"
        elif count and not 0 <= sampled.tokens.min() <= sampled.tokens.max() < self._limits.vocab:
            wrong = f"a token that is not in [0, {self._limits.vocab})"
        if wrong:
            raise ServerTrouble(f"{self._backend.name}: a wrong answer: {wrong}")

    def _up_to_stop(self, request: GenerateRequest, sampled: Completion) -> Completion:
        """Ended by the request's stop strings, where it has some."""
        tokens, logprobs = sampled.tokens.tolist(), sampled.logprobs.tolist()
        if (stops := StopStrings.of(request, self._tokenizer)) is not None:
            for count, token in enumerate(tokens, start=1):
                if stops.completes(token):
                    return completion(request.adapter, tokens[:count], logprobs[:count], "stop")
        return sampled
