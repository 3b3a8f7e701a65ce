"""The embedded inference engine: InferenceEngine on the torch-native decoder.

The event loop only enqueues and waits; tensors are touched on the decode thread alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

from lorelei.inference.contract import Health, completion
from lorelei.inference.embedded.decoding import Decoding, Outcome
from lorelei.inference.embedded.kind import PREFILL_TOKENS
from lorelei.inference.embedded.published import PublishedAdapters
from lorelei.inference.embedded.sampler import uniform_stream
from lorelei.inference.embedded.scheduler import Row, Scheduler
from lorelei.inference.embedded.scoring import score
from lorelei.inference.embedded.worker import Worker
from lorelei.inference.limits import Limits, check_loaded
from lorelei.inference.stops import StopStrings
from lorelei.lora.state import AdapterState
from lorelei.model.decoder import Decoder
from lorelei.model.tokenizer import Tokenizer
from lorelei.types import AdapterRef, Completion, Floats, GenerateRequest, Ints

T = TypeVar("T")
Arrival = tuple[GenerateRequest, "asyncio.Future[Completion]"]


class EmbeddedEngine:
    """Samples on one thread of this process. All calls come from one event loop."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer | None = None,
        *,
        max_running: int = 32,
        max_context: int | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
    ) -> None:
        """tokenizer: for stop strings only. max_context: None: all positions of the model.

        prefill_tokens: how many prompt tokens one step reads (a longer prompt is read alone).
        """
        self._tokenizer = tokenizer
        self._limits = Limits(
            vocab=decoder.config.vocab,
            context=decoder.config.context(max_context),
            decodes_text=tokenizer is not None,
        )
        # the event loop's side
        self._served: set[str] = set()
        self._arrivals: list[Arrival] = []
        self._unfinished = 0
        # the decode thread's side
        self._scheduler = Scheduler(max_running, prefill_tokens)
        self._published = PublishedAdapters(decoder)
        self._decoding = Decoding(decoder, self._scheduler, self._published)
        self._held: set[str] = set()  # why nothing is decoded: "pause", "sleep"
        self._retiring: dict[str, asyncio.Future[None]] = {}
        self._worker = Worker(self._turn)

    async def generate(self, request: GenerateRequest) -> Completion:
        check_loaded(request.adapter, self._served)
        self._limits.check_request(request)
        future: asyncio.Future[Completion] = self._worker.future()
        if not self._arrivals:  # all requests of this turn of the loop go to the thread at once
            asyncio.get_running_loop().call_soon(self._flush)
        self._arrivals.append((request, future))
        self._unfinished += 1
        try:
            return await future
        except asyncio.CancelledError:
            self._worker.post(lambda: None)  # the thread then sees that the future is cancelled
            raise
        finally:
            self._unfinished -= 1

    async def score(
        self, sequences: Sequence[Ints], adapter: AdapterRef | None, temperature: float = 1.0
    ) -> list[Floats]:
        check_loaded(adapter, self._served)
        for sequence in sequences:
            self._limits.check_sequence(sequence)
        name = adapter.served_name if adapter is not None else None
        return await self._call(lambda: score(self._published, sequences, name, temperature))

    async def load(self, ref: AdapterRef, state: AdapterState) -> str | None:
        digest = await self._call(lambda: self._published.install(ref.served_name, state))
        self._served.add(ref.served_name)
        return digest

    async def unload(self, ref: AdapterRef) -> None:
        check_loaded(ref, self._served)
        future: asyncio.Future[None] = self._worker.future()
        self._served.remove(ref.served_name)  # from now on no request may use it
        self._flush()
        self._worker.post(lambda: self._retiring.update({ref.served_name: future}))
        await future

    async def pause(self) -> None:
        await self._call(lambda: self._held.add("pause"))

    async def resume(self) -> None:
        await self._call(lambda: self._held.discard("pause"))

    async def abort(self, adapter: AdapterRef | None = None) -> None:
        await self._call(lambda: self._abort(adapter))

    async def sleep(self) -> None:
        """Rows that still run wait and keep their keys and values, so that nothing is lost."""
        await self._call(lambda: self._held.add("sleep"))
        await self._call(self._decoding.release)

    async def wake(self) -> None:
        await self._call(lambda: self._held.discard("sleep"))

    async def health(self) -> Health:
        running = len(self._scheduler.running)
        return Health(
            alive=self._worker.alive,
            running=running,
            waiting=max(0, self._unfinished - running),
            adapters=tuple(sorted(self._served)),
            tokens_generated=self._decoding.tokens_generated,
        )

    async def close(self) -> None:
        await self._worker.close()

    # --- on the event loop

    async def _call(self, work: Callable[[], T]) -> T:
        """Run `work` on the decode thread, behind every request so far."""
        self._flush()
        return await self._worker.call(work)

    def _flush(self) -> None:
        arrivals, self._arrivals = self._arrivals, []
        if arrivals:
            self._worker.post(lambda: self._submit(arrivals))

    # --- on the decode thread

    def _turn(self) -> bool:
        """Whether there is more to do without another command."""
        for row in [r for r in self._scheduler.waiting if r.future.cancelled()]:
            self._scheduler.drop(row)
        for row in [r for r in self._scheduler.running if r.future.cancelled()]:
            self._decoding.leave(row)
        if not self._held:
            for row, outcome in self._decoding.step():
                self._finish(row, outcome)
        for name in [n for n in self._retiring if not self._scheduler.uses(n)]:
            self._published.remove(name)
            self._worker.resolve(self._retiring.pop(name), None)
        return not self._held and bool(self._scheduler.running or self._scheduler.waiting)

    def _submit(self, arrivals: Sequence[Arrival]) -> None:
        for request, future in arrivals:
            sampling, limit = request.sampling, self._limits.new_tokens(request)
            before = request.position
            uniforms = uniform_stream(sampling.seed, request.key, before + limit)[before:]
            stops = StopStrings.of(request, self._tokenizer)
            prompt = self._scheduler.prompt(request)
            self._scheduler.submit(Row(request, future, prompt, limit, uniforms, stops))

    def _abort(self, adapter: AdapterRef | None) -> None:
        def meant(row: Row) -> bool:
            return adapter is None or row.prompt.adapter == adapter.served_name

        for row in filter(meant, list(self._scheduler.waiting)):
            self._scheduler.drop(row)
            self._finish(row, "abort")
        for row in filter(meant, list(self._scheduler.running)):
            self._decoding.leave(row)
            self._finish(row, "abort")

    def _finish(self, row: Row, outcome: Outcome) -> None:
        if isinstance(outcome, FloatingPointError):
            self._worker.resolve(row.future, outcome)
            return
        answer = completion(row.request.adapter, row.tokens, row.logprobs, outcome)
        self._worker.resolve(row.future, answer)
